"""Files that are whole or absent, locks, and full disks: of runs, and of conversions."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fastil.errors import UserError

if TYPE_CHECKING:
    import torch  # otherwise loaded where it is needed: the tools on files do without

RESUME = "go on with --resume"  # once a file can be written
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def written(path: Path, then: str = RESUME) -> Iterator[None]:
    """Turn a failed write of this file into a UserError. then: what to do once it can be written."""
    try:
        yield
    except BrokenPipeError:  # whoever reads what is shown has gone
        raise
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno in FULL:
            full = f"{path}: disk full ({cause.strerror}), nothing written before is lost"
            raise UserError(f"{full}; free some space and {then}") from None
        raise UserError(f"{path}: cannot be written ({error}); once it can, {then}") from None


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], then: str = RESUME) -> None:
    """Write beside the target, sync, rename: after a crash the path holds the old content or the new, never a part."""
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
    """Make a rename in it last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def save(path: Path, state: dict[str, Any]) -> None:
    """A checkpoint: tensors and plain containers only, so that loading it runs no code."""
    import torch

    write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path, device: "torch.device") -> dict[str, Any]:
    import torch

    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged zip or pickle raises many types
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"{path}: not a whole checkpoint ({reason}); remove it to start the run anew") from None
    return state


def load_weights(module: "torch.nn.Module", weights: Mapping[str, Any], path: Path) -> None:
    """Put the weights of a file into a network. Raises UserError where they are of another one."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        found = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: its weights are of another network; give the code that they were trained with ({found})"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run directory for this process; the kernel lets go when the process ends, however it ends."""
    path = folder / "lock"
    with written(path):
        file = open(path, "w")  # noqa: SIM115  (held while the run lasts)
    with file:
        try:
            free = lock(file.fileno())
        except OSError as error:
            raise UserError(f"{path}: cannot be locked ({error.strerror}); choose --out on another disk") from None
        if not free:
            raise UserError(f"{folder}: another process is running there; wait for it or choose another --out")
        yield


def lock(descriptor: int) -> bool:
    """Hold an open file for this process, until it is closed. False: another process holds it. Raises OSError on a
    file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
