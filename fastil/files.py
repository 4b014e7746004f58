"""Files of runs and conversions: written whole or not at all, read with clear errors, locked; full disks."""

import contextlib
import errno
import fcntl
import json
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastil.errors import UserError
from fastil.text import one_line

if TYPE_CHECKING:
    import torch  # loaded when needed, because the tools on files do without

RESUME = "go on with --resume"  # once a file can be written
NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # and do not wait for the other end of a pipe
HOLDER = 2**16  # bytes to read of a lock file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Damaged(UserError):
    """A file that can be read but does not hold what it should. found: the message without the fix."""

    def __init__(self, path: Path, reason: str, fix: str) -> None:
        self.found = one_line(f"{path}: {' '.join(reason.split())}")
        super().__init__(f"{self.found}; {fix}")


@contextlib.contextmanager
def written(path: Path, then: str = RESUME) -> Iterator[None]:
    """Turn a failed write of this file, or a failed read of another that goes into it, into a UserError. then: what to
    do once the cause is gone.
    """
    try:
        yield
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except OSError as error:
        if error.errno in FULL:
            full = f"{path}: disk full ({error.strerror}), nothing written before is lost"
            raise UserError(f"{full}; free some space and {then}") from None
        if isinstance(error.filename, str) and not error.filename.startswith(str(path)):
            raise UserError(f"{error.filename}: {error.strerror}; once it can be read, {then}") from None
        raise UserError(f"{path}: cannot be written ({error}); once it can, {then}") from None


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], then: str = RESUME) -> None:
    """Write next to the target, sync, rename. After a crash the path holds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with written(path, then):
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in it outlast a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8; the file is whole or stays as it was."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    """Write JSON; the file is whole or stays as it was."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def read(path: Path, fix: str) -> bytes:
    """Return the bytes of a file. Raises UserError if it is missing or cannot be read. fix: what to do then."""
    with readable(path, fix):
        return path.read_bytes()


@contextlib.contextmanager
def readable(path: Path, fix: str) -> Iterator[None]:
    """Turn a failed read of this file into a UserError with this fix."""
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise OSError(None, "not a file")
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {fix}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); mend that, or {fix}") from None


def save(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint of tensors and plain containers only, so that loading it runs no code."""
    import torch

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # how torch reports a failed write
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(path, write)


def load(path: Path, device: "torch.device", fix: str) -> dict[Any, Any]:
    """Return what `save` wrote, on this device. Raises UserError if it is missing or cannot be read, and Damaged if it
    holds something else. fix: what to do then.
    """
    import torch

    with readable(path, fix), warnings.catch_warnings(action="ignore"):  # torch warns of some foreign pickles
        try:
            state: Any = torch.load(path, map_location=device, weights_only=True)
        except OSError as error:
            if error.errno != errno.EINVAL:  # how torch fails on some files that were cut short
                raise
            raise Damaged(path, "not a whole checkpoint", fix) from None
        except (MemoryError, torch.OutOfMemoryError):
            raise UserError(f"{path}: too little memory to read it; free some and repeat the command") from None
        except Exception as error:  # a damaged zip or pickle raises many types
            reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
            if reason.startswith("PytorchStreamReader"):
                reason = "cut short, or damaged"
            if reason.startswith("Weights only"):  # the rest advises to trust the file
                reason = "it is damaged, or holds other things than tensors and numbers"
            raise Damaged(path, f"not a whole checkpoint ({reason})", fix) from None
    if not isinstance(state, dict):
        raise Damaged(path, f"holds {type(state).__name__} and no checkpoint", fix)
    return state


def load_weights(module: "torch.nn.Module", weights: Mapping[str, Any], path: Path, fix: str) -> None:
    """Put the weights of a file into a network. Raises Damaged if they belong to another network or are not numbers."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        found = " ".join(str(error).split())[:300]
        advice = f"give the code that they were trained with, or {fix}"
        raise Damaged(path, f"its weights are of another network ({found})", advice) from error
    if any(bool(value.isnan().any()) for value in weights.values()):
        raise Damaged(path, "holds weights that are NaN", fix)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[bytes]]:
    """Hold the run directory for this process and yield its lock file. The kernel releases it when the process ends,
    however it ends.
    """
    path = folder / "lock"
    with written(path):
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666), "r+b", buffering=0)
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path}: not a file; choose another --out")
        try:
            free = lock(file.fileno())
            free = free and os.path.samestat(os.fstat(file.fileno()), os.lstat(path))  # else it was just removed
        except FileNotFoundError:
            free = False
        except OSError as error:
            path.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot be locked ({error.strerror}); choose --out on another disk") from None
        if not free:
            raise UserError(f"{folder}: another process is running there; wait for it or choose another --out")
        yield file


def holder_of(folder: Path) -> str:
    """Return the content of a run directory's lock file: empty if there is none or another program wrote it."""
    with (
        contextlib.suppress(OSError, ValueError),
        os.fdopen(os.open(folder / "lock", os.O_RDONLY | NO_LINK), "rb") as file,
    ):
        return file.read(HOLDER).decode() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else ""
    return ""


def lock(descriptor: int) -> bool:
    """Hold an open file for this process, until it is closed. False: another process holds it. Raises OSError on a
    file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
