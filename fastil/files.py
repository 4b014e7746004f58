"""Files that are whole or absent, and the lock of a run directory."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from fastil.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn a failed write of this file into a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno in FULL:
            raise UserError(
                f"{path}: disk full, nothing written before is lost; free some space and go on with --resume"
            ) from None
        raise UserError(f"{path}: cannot be written ({error}); once it can, go on with --resume") from None


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside the target, sync, rename: after a crash the path holds the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with written(path):
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def save(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint: tensors and plain containers only, so that loading it runs no code."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged zip or pickle raises many types
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"{path}: not a whole checkpoint ({reason}); remove it to start the run anew") from None
    return state


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run directory for this process; the kernel lets go when the process ends, however it ends."""
    path = folder / "lock"
    with written(path):
        file = open(path, "w")  # noqa: SIM115  (held while the run lasts)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is running there; wait for it or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(f"{path}: cannot be locked ({error.strerror}); choose --out on another disk") from None
        yield
