"""`fastil info` and `fastil export`: the content of a .beton, and its images as files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastil.data.formats.beton import RAW, Beton
from fastil.errors import UserError
from fastil.protocol import Ids
from fastil.text import one_line
from fastil.tools.images import MADE

NAMED = 100  # classes that `as_text` names; it counts the rest


def info(path: Path) -> dict[str, Any]:
    """Return the content of a file for programs."""
    with Beton(path) as beton:
        counts = np.bincount(beton.labels, minlength=len(beton.class_names))
        manifest = beton.manifest
        found: dict[str, Any] = {
            "file": str(path),
            "bytes": beton.bytes,
            "images": len(beton),
            "mode": beton.mode,
            "page_size": beton.page_size,
            "heights": [int(beton.sizes[:, 0].min()), int(beton.sizes[:, 0].max())],
            "widths": [int(beton.sizes[:, 1].min()), int(beton.sizes[:, 1].max())],
            "classes": len(beton.class_names),
            "counts": counts.tolist(),
            "class_names": beton.class_names,
        }
        if manifest is not None:
            found |= {
                "split": manifest.split,
                "source": manifest.source,
                "parameters": manifest.parameters,
                "tool": manifest.tool,
                "sha256": manifest.sha256,
                "reencoded": len(manifest.reencoded),
                "skipped": len(manifest.skipped),
                "notes": manifest.notes,
            }
        return found


def as_text(found: dict[str, Any]) -> str:
    """Return `info` for people."""
    low, high = min(found["counts"]), max(found["counts"])
    names = found["class_names"]
    lines = [
        f"{found['file']}: {found['images']:,} images of {found['classes']:,} classes, {found['bytes'] / 1e6:,.1f} MB",
        f"  stored    {found['mode']}, {found['widths'][0]} to {found['widths'][1]} wide, {found['heights'][0]} to "
        f"{found['heights'][1]} high, pages of {found['page_size'] >> 20} MiB",
        f"  classes   {low:,} to {high:,} images each: {', '.join(names[:NAMED])}"
        + (f" and {len(names) - NAMED:,} more (--json has all)" if len(names) > NAMED else ""),
    ]
    if "source" in found:
        lines += [
            f"  source    {found['source']['kind']}: {found['source']['path']} ({found['split']})",
            f"  changed   {found['reencoded']:,} {MADE[found['mode']]}, {found['skipped']:,} left out",
            f"  sha256    {found['sha256']}",
            f"  written   by {found['tool']}",
        ]
        lines += [f"  note      {text}" for text in found["notes"]]
    else:
        lines.append("  no manifest next to it: written by FFCV, or the manifest was lost")
    return "\n".join(map(one_line, lines))


def export(path: Path, folder: Path, classes: Sequence[str], ids: Sequence[int]) -> int:
    """Write images to FOLDER/<class>/<name>, JPEGs byte for byte and pixels as PNG, and return how many.

    classes, ids: write only those; without any, all. A file that is there already is never overwritten.
    """
    with Beton(path) as beton:
        chosen = wanted(beton, classes, ids)
        for i in chosen:
            target = folder / plain(beton.class_names[beton.labels[i]]) / name_of(beton, int(i))
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                content = beton.encoded(int(i)) if beton.modes[i] != RAW else as_png(beton.image(int(i)))
                with open(target, "xb") as file:
                    try:
                        file.write(content)
                        file.flush()
                    except BaseException:
                        target.unlink()  # better none than half of one
                        raise
            except FileExistsError:
                raise UserError(f"{target}: exists already; export to an empty folder") from None
            except OSError as error:
                raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
        return len(chosen)


def as_png(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels, uint8 [h, w, 3], as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def wanted(beton: Beton, classes: Sequence[str], ids: Sequence[int]) -> Ids:
    """Return the ids of samples of these classes and with these ids, int64. Raises UserError for an unknown one."""
    for i in ids:
        if not 0 <= i < len(beton):
            raise UserError(f"--id {i}: {beton.path} has samples 0 to {len(beton) - 1}")
    known = {name: label for label, name in enumerate(beton.class_names)}
    for name in classes:
        if name not in known:
            raise UserError(f"--class {name}: {beton.path} has no such class; fastil info lists them")
    if not classes and not ids:
        return np.arange(len(beton))
    of_class = np.flatnonzero(np.isin(beton.labels, [known[name] for name in classes]))
    return np.union1d(of_class, np.array(ids, dtype=np.int64))


def name_of(beton: Beton, i: int) -> str:
    """Return a file name that no other sample has."""
    suffix = ".png" if beton.modes[i] == RAW else ".jpg"
    stem = plain(Path(beton.name(i)).name)
    for known in (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"):
        stem = stem[: -len(known)] if stem.lower().endswith(known) else stem
    return f"{i:08d}{suffix}" if stem == f"{i:08d}" else f"{i:08d}_{stem}{suffix}"


def plain(name: str) -> str:
    """Return a name that stays inside its folder."""
    return name.replace("/", "_").replace("\\", "_").replace("\0", "_").lstrip(".") or "_"
