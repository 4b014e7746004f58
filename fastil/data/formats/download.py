"""Public data sets over HTTP: progress, resume, checksum, safe unpacking."""

import hashlib
import http.client
import os
import shutil
import ssl
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

from tqdm import tqdm

from fastil.data.formats.cifar import CIFAR10, CIFAR100, Variant
from fastil.errors import UserError

SITE = "https://www.cs.toronto.edu/~kriz/"
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (CIFAR10, CIFAR100)}
CHUNK = 2**20
TIMEOUT = 60  # seconds without a byte


def download(name: str, folder: Path, url: str | None = None) -> Path:
    """Fetch and unpack a data set below `folder`; returns the folder with its files.

    The archive grows as NAME.partial, a second call goes on where the first one broke off, and it gets its name only
    when its md5 is the published one. A data set that is there already is not fetched again.
    """
    if name not in VARIANTS:
        raise UserError(f"unknown data set {name}: use one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    target = folder / variant.python_folder
    if all(md5_of(target / file.name) == file.md5 for file in (*variant.train, variant.test, variant.meta)):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / variant.archive
        if not archive.exists():
            fetch(url or SITE + variant.archive, archive, variant.archive_md5)
        elif md5_of(archive) != variant.archive_md5:
            raise UserError(
                f"{archive}: damaged, its md5 is not {variant.archive_md5}; remove it and run the command again"
            )
        unpack(archive, target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another DIR") from None
    return target


def fetch(url: str, path: Path, md5: str) -> None:
    """Download url to path, resuming path.partial; the md5 decides whether it counts."""
    partial = path.with_name(path.name + ".partial")
    done = partial.stat().st_size if partial.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            if done and response.status != 206:  # a server without ranges sends everything again
                done = 0
            length = response.headers.get("Content-Length")
            total = done + int(length) if length else None
            with (
                open(partial, "ab" if done else "wb") as file,
                tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name) as bar,
            ):
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                    done += len(chunk)
        if total is not None and done < total:
            raise UserError(
                f"{url}: broke off after {done} of {total} bytes; run the command again, it goes on from there"
            )
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the partial file is complete already
            raise UserError(f"{url}: {error.code} {error.reason}; try --url with a mirror") from None
    except (http.client.InvalidURL, ValueError) as error:
        raise UserError(f"{url}: not an address ({error}); --url needs one with http:// or https://") from None
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{url}: {reason}; run the command again, it goes on from there, or try --url with a mirror"
        ) from None
    found = md5_of(partial)
    if found != md5:
        partial.unlink()
        raise UserError(f"{url}: md5 {found} instead of {md5}; the damaged file was removed, run the command again")
    partial.rename(path)


def md5_of(path: Path) -> str | None:
    """None: no file there that can be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return None


def extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write a plain file of the archive below the folder; refuse links, devices and paths that lead outside. (Python
    before 3.11.4 has no extraction filter.)"""
    path = Path(os.path.normpath(folder / member.name))
    content = tar.extractfile(member) if member.isreg() else None
    if content is None or not path.is_relative_to(os.path.normpath(folder)):
        raise tarfile.TarError(f"{member.name} is a link, a device or leads outside")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        shutil.copyfileobj(content, file)


def unpack(archive: Path, target: Path) -> None:
    """Unpack beside the target and rename, so that a half-unpacked folder never carries its name."""
    staging = archive.with_name(archive.name + ".unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not member.isdir():
                    extract(tar, member, staging)
        shutil.rmtree(target, ignore_errors=True)  # is damaged, or nothing would have been fetched
        (staging / target.name).rename(target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: not a whole archive ({error}); remove it and run the command again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
