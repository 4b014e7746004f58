"""Public data sets over HTTP: progress, resume, checksum, safe unpacking. No server can hold it up or fill the disk."""

import contextlib
import hashlib
import http.client
import os
import queue
import re
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from fastil.data.formats.cifar import CIFAR10, CIFAR100, Variant
from fastil.errors import UserError
from fastil.text import Bar

SITE = "https://www.cs.toronto.edu/~kriz/"
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (CIFAR10, CIFAR100)}
CHUNK = 2**16
AHEAD = 16  # chunks received ahead of those that are written
STALL, LEAST = 60.0, 2**16  # a server that sends fewer than LEAST bytes in STALL seconds is given up
SCHEMES = ("http", "https")
MIRROR = "try --url with a mirror"
GO_ON = "run the command again, it goes on from there"


def download(name: str, folder: Path, url: str | None = None) -> Path:
    """Fetch and unpack a data set below `folder`; returns the folder with its files.

    The archive grows as NAME.partial. A second call continues where the first one broke off. The file gets its name
    only if its md5 is the published one. A data set that is there already is not fetched again.
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
            fetch(url or SITE + variant.archive, archive, variant.archive_bytes, variant.archive_md5)
        elif md5_of(archive) != variant.archive_md5:
            raise UserError(
                f"{archive}: damaged, its md5 is not {variant.archive_md5}; remove it and run the command again"
            )
        unpack(archive, target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another DIR") from None
    return target


def kept(name: str, folder: Path) -> str:
    """Return what a stopped download left behind, as the beginning of a sentence; or ""."""
    partial = partial_of(folder / VARIANTS[name].archive)
    return f"{partial} keeps the {partial.stat().st_size:,} bytes that have come, and " if partial.exists() else ""


def partial_of(path: Path) -> Path:
    """Return the path of a file while it is not whole."""
    return path.with_name(path.name + ".partial")


def fetch(url: str, path: Path, size: int, md5: str) -> None:
    """Download a file of `size` bytes from url to path, resuming path.partial. The md5 decides whether it counts."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in SCHEMES and bool(parts.hostname)
    except ValueError:
        known = False
    if not known:
        raise UserError(f"{url}: not an address; --url needs one with http:// or https:// and a host")
    partial = partial_of(path)
    receive(url, partial, size)
    found = md5_of(partial)
    if found != md5:
        partial.unlink()
        raise UserError(f"{url}: md5 {found} instead of {md5}; the damaged file was removed, run the command again")
    partial.rename(path)


def receive(url: str, partial: Path, size: int) -> None:
    """Append to the partial file what it lacks of `size` bytes, and no byte more, whatever the server sends. Raises
    UserError if the rest cannot be had; what has arrived is kept.
    """
    before = done = partial.stat().st_size if partial.exists() else 0
    if done >= size:
        return
    bar = Bar()
    bar.begin(partial.stem, size, done, "B")
    try:
        with open(partial, "ab") as file, contextlib.closing(pieces(url, done)) as incoming:
            for piece in incoming:
                if piece.whole not in (None, size):  # another file, such as the login page of a hotel's network
                    done = file.truncate(before)
                    raise UserError(f"{url}: a file of {piece.whole:,} bytes and not of {size:,}; {MIRROR}")
                # A server without ranges starts at 0 again.
                fresh = piece.content[max(0, done - piece.at) : size - piece.at]
                done += file.write(fresh)
                bar.advance(len(fresh))
                if done == size:
                    return
    finally:
        bar.end()
        if not done:
            partial.unlink(missing_ok=True)
    raise UserError(f"{url}: broke off after {done} of {size} bytes; {GO_ON}")


class Piece(NamedTuple):
    """Content of a file from byte `at` on. whole: the bytes of the whole file, None if the server does not say."""

    at: int
    whole: int | None
    content: bytes


def pieces(url: str, start: int) -> Generator[Piece, None, None]:
    """Yield the file from byte `start` on, or from an earlier one if the server does not start there. The first piece
    is empty.

    Raises UserError when the server sends fewer than LEAST bytes in STALL seconds, whatever it is doing: the deadline
    also covers looking up its name, headers, redirects and the lengths of chunks.
    """
    received: queue.Queue[Piece | Exception | None] = queue.Queue(AHEAD)
    stopped = threading.Event()
    # A daemon, because nothing ends a read from a server that sends a byte now and then.
    threading.Thread(target=transfer, args=(url, start, received, stopped), daemon=True).start()
    deadline, count = time.monotonic() + STALL, 0
    try:
        while True:
            try:
                item = received.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                item = TimeoutError(f"fewer than {LEAST:,} bytes in {STALL:g} s")
            if item is None:
                return
            if isinstance(item, Exception):
                raise failure(url, start, item) from None
            yield item
            count += len(item.content)
            if count >= LEAST:
                deadline, count = time.monotonic() + STALL, 0
    finally:
        stopped.set()
        while not received.empty():  # lets the thread put its last one
            received.get()


def transfer(url: str, start: int, received: "queue.Queue[Piece | Exception | None]", stopped: threading.Event) -> None:
    """Put the pieces of a file into the queue until it ends or nobody wants them, then None or what went wrong."""
    handlers = (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, Redirects,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    )  # fmt: skip
    opener = urllib.request.OpenerDirector()  # build_opener would add file:, ftp: and data:
    for handler in handlers:
        opener.add_handler(handler())
    end: Exception | None = None
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with opener.open(request, timeout=2 * STALL) as response:  # by the time it runs out, nobody waits any more
            at, whole = extent(response, start)
            received.put(Piece(at, whole, b""))
            while not stopped.is_set() and (content := response.read1(CHUNK)):
                received.put(Piece(at, whole, content))
                at += len(content)
            if response.chunked and not stopped.is_set():  # it ended properly, so its length is known
                received.put(Piece(at, at, b""))
    except urllib.error.HTTPError as error:
        error.close()
        end = error
    except Exception as error:
        end = error
    received.put(end)


def extent(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """Return where the content begins in the file, and the file's length if the server says it."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0, response.length
    said = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", said)
    if found is None or int(found[1]) > start:
        raise http.client.HTTPException(f"Content-Range {said!r}, asked for {start}-")
    return int(found[1]), None if found[2] == "*" else int(found[2])


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and does not read their bodies, which may never end."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        fp.close()
        if urlsplit(newurl).scheme not in SCHEMES:
            raise urllib.error.HTTPError(
                newurl, code, f"{msg} - Redirection to url '{newurl}' is not allowed", headers, fp
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def failure(url: str, start: int, error: Exception) -> UserError:
    """Return the error that says what went wrong on the way, and what to do."""
    if isinstance(error, urllib.error.HTTPError):
        what = f"{url}: {error.code} {error.reason}"
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return UserError(
                f"{what}: it has not the {start} bytes that the .partial file has; remove that, or {MIRROR}"
            )
        return UserError(f"{what}; {MIRROR}")
    if isinstance(error, http.client.InvalidURL | ValueError):
        return UserError(f"{url}: not an address, or leads to none ({error}); {MIRROR}")
    reason = str(getattr(error, "reason", error)) or type(error).__name__
    return UserError(f"{url}: {reason}; {GO_ON}, or {MIRROR}")


def md5_of(path: Path) -> str | None:
    """Return the md5 sum of a file. None: there is no file that can be read."""
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError:
        return None


def extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    """Write a plain file of the archive below the folder. Refuses links, devices and paths that lead outside. (Python
    before 3.11.4 has no extraction filter.)
    """
    path = Path(os.path.normpath(folder / member.name))
    content = tar.extractfile(member) if member.isreg() else None
    if content is None or not path.is_relative_to(os.path.normpath(folder)):
        raise tarfile.TarError(f"{member.name} is a link, a device or leads outside")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        shutil.copyfileobj(content, file)


def unpack(archive: Path, target: Path) -> None:
    """Unpack next to the target and rename, so that a half-unpacked folder never has its name."""
    staging = archive.with_name(archive.name + ".unpacking")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if not member.isdir():
                    extract(tar, member, staging)
        shutil.rmtree(target, ignore_errors=True)  # it is damaged, or nothing would have been fetched
        (staging / target.name).rename(target)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{archive}: not a whole archive ({error}); remove it and run the command again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
