"""Files in parts small enough to carry to a machine without network, put together there and checked by their hashes.

python -m bench.carry pack FILE [FILE ...] FOLDER      parts of at most 56 MiB and a manifest, into FOLDER
python -m bench.carry pack --classes N [--recipe NAME] DATA FOLDER
                                                       the same of the first N classes of a data set alone
python -m bench.carry unpack FOLDER TO                 the files, into the folder TO

Needs nothing but Python, --classes an installed fastil. Parts may arrive one after the other; `unpack` names those that
are missing or damaged and writes no file before all of it is right.

--classes takes the classes that the recipe NAME (cifar100_balanced_5) learns first, as a tar, and adds a recipe that
trains on them what NAME trains on all of it with classes=N: in the same order, and in the same steps if N is enough for
them; if not, half of the classes first, then five steps. 30 classes of CIFAR-100 can be carried at once.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastil.data.formats.records import Source

PART = 56 * 2**20  # 58.7 MB
MANIFEST = "manifest.json"


def pack(files: list[Path], folder: Path, part_bytes: int = PART) -> list[Path]:
    """Write the files as parts, and the manifest, into a folder. Returns the parts. Raises ValueError for files that
    cannot be packed together."""
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"two files have one name among {', '.join(names)}: rename one")
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file; give files, such as a .beton or a tar")
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written, entries = [], []
    for file in files:
        whole, size = hashlib.sha256(), 0
        parts: list[dict[str, Any]] = []
        with file.open("rb") as source:
            while content := source.read(part_bytes):
                name = f"{file.name}.{len(parts):03d}"
                (folder / name).write_bytes(content)
                written.append(folder / name)
                whole.update(content)
                size += len(content)
                parts.append({"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        entries.append({"name": file.name, "bytes": size, "sha256": whole.hexdigest(), "parts": parts})
    (folder / MANIFEST).write_text(json.dumps({"files": entries}, indent=1) + "\n")
    return written


def first_classes(data: Path, count: int, recipe: str, folder: Path) -> list[Path]:
    """Write the classes of a data set that a recipe learns first, and a recipe for them, into a folder. Returns the
    files. Raises UserError for a data set or a number that does not fit the recipe."""
    import yaml

    from fastil import recipe_file
    from fastil.data import load_dataset
    from fastil.data.formats.detect import open_source
    from fastil.errors import UserError
    from fastil.protocol import build_protocol
    from fastil.tools.choice import subset

    if recipe not in recipe_file.names():
        raise UserError(f"--recipe {recipe}: no recipe that comes with fastil, as it must be there too")
    whole = recipe_file.load(recipe, data=str(data))
    if whole.data.dataset == "imagenet":
        raise UserError(f"--recipe {recipe}: streams a .beton; fastil convert --classes makes a small one to carry")
    names = load_dataset(whole.data).class_names
    if not 2 <= count <= len(names):
        raise UserError(f"--classes {count}: must lie between 2 and the {len(names)} classes of {data}")
    steps: dict[str, Any] = {}
    protocol = replace(whole.protocol, classes=count)
    try:
        order = build_protocol(protocol, len(names), names).order
    except UserError:
        added = count // 2
        steps = {"base_classes": count - added, "increment": [(added + i) // 5 for i in range(5) if added + i >= 5]}
        order = build_protocol(replace(protocol, **steps), len(names), names).order
    first = [names[label] for label in order]
    listed, archive = folder / "names", folder / f"first{count}.tar"
    listed.write_text("".join(f"{name}\n" for name in first))
    write_tar(subset(open_source(data), str(listed), None), archive)
    listed.unlink()
    keys = {
        "base": recipe, "description": f"the first {count} classes of {recipe}", "order": first, "verify": False,
        **steps,
    }  # fmt: skip
    (folder / f"first{count}.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return sorted(folder.iterdir())


def write_tar(source: "Source", path: Path) -> None:
    """Write a data set as train/<class>/<number>.<kind> and val/..., in its order; pixels as PNG."""
    from fastil.tools.export import as_png

    with tarfile.open(path, "w") as archive:
        for split, records in (("train", source.train), ("val", source.val)):
            for i in range(len(records or ())):
                assert records is not None
                content = records.content(i)
                if not isinstance(content, bytes):
                    content = as_png(content)
                kind = "jpg" if content.startswith(b"\xff\xd8") else "png"
                member = tarfile.TarInfo(f"{split}/{source.class_names[records.labels[i]]}/{i:06d}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """Return the manifest's entries. Raises ValueError where it is missing or damaged."""
    path = folder / MANIFEST
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text())["files"]
        for entry in entries:
            for one in (entry, *entry["parts"]):
                if Path(one["name"]).name != one["name"] or not isinstance(one["sha256"], str):
                    raise ValueError(one["name"])
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; carry it with the parts") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged; carry it again") from None
    return entries


def problems(folder: Path, entries: list[dict[str, Any]]) -> list[str]:
    """Return a line for each part that is missing or damaged."""
    found = []
    for part in (part for entry in entries for part in entry["parts"]):
        path = folder / part["name"]
        if not path.is_file():
            found.append(f"{part['name']} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
            found.append(f"{part['name']} is damaged")
    return found


def check(folder: Path) -> list[dict[str, Any]]:
    """Return the manifest's entries. Raises ValueError that names every part to carry again."""
    entries = read_manifest(folder)
    wrong = problems(folder, entries)
    if wrong:
        raise ValueError(f"{folder}: {', '.join(wrong)}; carry {'it' if len(wrong) == 1 else 'them'} again")
    return entries


def unpack(folder: Path, to: Path) -> list[Path]:
    """Put the files together in the folder `to`. Returns them. Raises ValueError where the parts are not right."""
    entries = check(folder)
    to.mkdir(parents=True, exist_ok=True)
    made = []
    for entry in entries:
        partial, whole = to / (entry["name"] + ".partial"), hashlib.sha256()
        with partial.open("wb") as target:
            for part in entry["parts"]:
                content = (folder / part["name"]).read_bytes()
                whole.update(content)
                target.write(content)
        if whole.hexdigest() != entry["sha256"]:
            partial.unlink()
            raise ValueError(f"{folder / MANIFEST}: its parts do not make up {entry['name']}; pack it again")
        os.replace(partial, to / entry["name"])
        made.append(to / entry["name"])
    return made


def check_empty(folder: Path) -> None:
    """Raise ValueError for a folder that has something in it."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; remove it or name another folder")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="make parts of files")
    packing.add_argument("--classes", type=int, metavar="N", help="only the first N classes of one data set")
    packing.add_argument(
        "--recipe", default="cifar100_balanced_5", help="whose class order says which are first (%(default)s)"
    )
    packing.add_argument("files", nargs="+", type=Path, help="to carry; with --classes one data set, file or folder")
    packing.add_argument("folder", type=Path, help="for the parts and the manifest: a new one, or empty")
    unpacking = commands.add_parser("unpack", help="put the files together and check them")
    unpacking.add_argument("folder", type=Path, help="with the parts and the manifest")
    unpacking.add_argument("to", type=Path, help="the folder for the files")
    given = parser.parse_args(arguments)
    try:
        if given.command == "unpack":
            made = unpack(given.folder, given.to)
        elif given.classes is None:
            made = pack(given.files, given.folder)
        elif len(given.files) > 1:
            raise ValueError(f"--classes {given.classes}: takes one data set, not {len(given.files)}")
        else:
            check_empty(given.folder)  # before minutes of work
            with tempfile.TemporaryDirectory() as name:
                made = pack(first_classes(given.files[0], given.classes, given.recipe, Path(name)), given.folder)
    except ImportError as error:
        print(f"--classes needs fastil and what it requires ({error}): pip install -e .", file=sys.stderr)
        raise SystemExit(2) from None
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    for path in made:
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    total = sum(path.stat().st_size for path in made)
    if given.command == "pack":
        print(f"{total / 2**20:.1f} MiB, to be carried {'at once' if total <= PART else 'in several goes'}")
    for recipe in (path for path in made if path.suffix == ".yaml"):
        print(f"train on it: fastil run {recipe} --data {recipe.with_suffix('.tar')}")


if __name__ == "__main__":
    main()
