"""Files in parts small enough to carry to a machine without network, put together there and checked by their hashes.

python -m bench.carry pack FILE [FILE ...] FOLDER      parts of at most 56 MiB and a manifest, into FOLDER
python -m bench.carry unpack FOLDER TO                 the files, into the folder TO

Needs nothing but Python. Parts may arrive one after the other; `unpack` names those that are missing or damaged and
writes no file before all of it is right.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

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
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; remove it or name another folder")
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


def unpack(folder: Path, to: Path) -> list[Path]:
    """Put the files together in the folder `to`. Returns them. Raises ValueError that names every part to carry
    again."""
    entries = read_manifest(folder)
    wrong = problems(folder, entries)
    if wrong:
        raise ValueError(f"{folder}: {', '.join(wrong)}; carry {'it' if len(wrong) == 1 else 'them'} again")
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


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("files", nargs="+", type=Path)
    packing.add_argument("folder", type=Path)
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("folder", type=Path)
    unpacking.add_argument("to", type=Path)
    given = parser.parse_args(arguments)
    try:
        made = pack(given.files, given.folder) if given.command == "pack" else unpack(given.folder, given.to)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    for path in made:
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
