"""Several processes that train one run together, started by torchrun, and what they exchange through torch.distributed.

A single process has rank 0 of 1 and exchanges nothing, so the training code is the same for any number.
"""

import contextlib
import io
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastil import machine
from fastil.errors import UserError

Result = TypeVar("Result")
COME_WITHIN = timedelta(minutes=10)  # how long processes wait for each other to start, as torchrun's machines do
# How long an exchange may take. The others wait while one process compiles or writes to a slow disk. Dead processes are
# torchrun's to notice.
PATIENCE = timedelta(hours=4)


class _Joined:
    """This process's place among the others."""

    rank, count = 0, 1
    device = torch.device("cpu")


_joined = _Joined()


def rank() -> int:
    """Return the number of this process, from 0 on."""
    return _joined.rank


def count() -> int:
    """Return the number of processes."""
    return _joined.count


def first() -> bool:
    """Return whether this is the process that writes files and shows progress."""
    return _joined.rank == 0


def launched() -> bool:
    """Return whether a launcher such as torchrun started this process as one of several."""
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def on_this_machine() -> tuple[int, int]:
    """Return this process's number among those launched on its machine, and how many they are."""
    if not launched():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK") or 0), machine.sharing()


def launchers() -> list[str]:
    """Return what identifies the launchers of this run, one per machine. They stay the same while torchrun starts the
    processes again, in any number. Empty if no torchrun started this process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return []
    began = ""
    with contextlib.suppress(OSError):  # not Linux. A process's number may later be another one's
        began = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    found: list[Any] = [None] * _joined.count
    if _joined.count == 1:
        found = [f"{platform.node()} {os.getppid()} {began}"]
    else:
        dist.all_gather_object(found, f"{platform.node()} {os.getppid()} {began}")
    return sorted(set(found))


@contextlib.contextmanager
def together(device: torch.device | None = None) -> Iterator[None]:
    """Join the processes that torchrun started, for as long as the block lasts; a single process stays single.

    device: what this process computes on; by default the GPU of its local rank, if there are GPUs. Uses NCCL on GPUs
    and gloo on CPUs. An existing process group is used and left as it is.
    """
    if not launched() or _joined.count > 1:
        yield
        return
    if device is None:
        device = torch.device("cuda", on_this_machine()[0]) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # exchanges of objects use it
    ours = not dist.is_initialized()
    if ours:
        _join(device)
    _joined.rank, _joined.count, _joined.device = dist.get_rank(), dist.get_world_size(), device
    try:
        yield
    except BaseException:
        # With NCCL the others would take part in it. With gloo its threads would abort the interpreter's exit.
        ours = ours and dist.get_backend() == "gloo"
        raise
    finally:
        _joined.__dict__.clear()
        if ours:
            dist.destroy_process_group()


def _join(device: torch.device) -> None:
    """Make the process group."""
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=COME_WITHIN)))  # type: ignore[attr-defined]
        prefixed = _of_this_attempt(store, rank, count)
    except dist.DistError as error:
        raise UserError(f"the processes of this run have not met: {error}") from None
    store.set_timeout(PATIENCE)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=prefixed, rank=rank, world_size=count, timeout=PATIENCE
    )


def _of_this_attempt(store: Any, rank: int, count: int) -> Any:
    """Return a part of the store that no earlier attempt has written to.

    torchrun keeps one store while it starts the processes again, with the addresses of dead ones in it, and counts its
    attempts on each machine apart. So a process writes a name that nobody had before it, and the first process answers
    that with its own.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + COME_WITHIN.total_seconds()
    if rank == 0:
        missing = set(range(1, count))
        while missing:
            for other in sorted(missing):
                if store.check([f"fastil/hello/{other}"]):
                    store.set(f"fastil/welcome/{store.get(f'fastil/hello/{other}').decode()}", own)
                if store.check([f"fastil/joined/{own}/{other}"]):
                    missing.remove(other)
            if time.monotonic() > deadline:
                raise UserError(_not_come(sorted(missing), count))
            time.sleep(0.01)
        return dist.PrefixStore(f"fastil/{own}", store)  # type: ignore[attr-defined]
    store.set(f"fastil/hello/{rank}", own)
    try:
        store.wait([f"fastil/welcome/{own}"], COME_WITHIN)
    except dist.DistStoreError:
        raise UserError(_not_come([0], count)) from None
    first_one = store.get(f"fastil/welcome/{own}").decode()
    store.set(f"fastil/joined/{first_one}/{rank}", "")
    return dist.PrefixStore(f"fastil/{first_one}", store)  # type: ignore[attr-defined]


def _not_come(missing: Sequence[int], count: int) -> str:
    names = ", ".join(map(str, missing))
    return (
        f"rank{'s' * (len(missing) > 1)} {names} of {count} did not come within "
        f"{COME_WITHIN.total_seconds() / 60:g} minutes; see what the output of the others says, and start all again"
    )


def from_first(make: Callable[[], Result]) -> Result:
    """Call `make` in the first process and return its result in all of them, tensors on each one's device.

    A UserError there is raised in all, any other error as a RuntimeError in the others. The result is pickled.
    """
    if _joined.count == 1:
        return make()
    answer: list[Any] = [None]
    if first():
        try:
            result, content = make(), io.BytesIO()
            torch.save(result, content)
            answer = [content.getvalue()]
            return result
        except UserError as error:
            answer = [(True, str(error))]
            raise
        except BaseException as error:
            answer = [(False, f"{type(error).__name__}: {error}")]
            raise
        finally:  # the others wait
            dist.broadcast_object_list(answer, device=_joined.device)
    dist.broadcast_object_list(answer, device=_joined.device)
    if isinstance(answer[0], tuple):
        users, line = answer[0]
        raise UserError(line) if users else RuntimeError(f"rank 0: {line}")
    received: Result = torch.load(io.BytesIO(answer[0]), map_location=_joined.device, weights_only=False)
    return received


@torch.no_grad()
def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite these tensors, on any device, with those of the first process."""
    if _joined.count == 1:
        return
    for dtype in {tensor.dtype: None for tensor in tensors}:
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().reshape(-1).to(_joined.device) for tensor in some])
        dist.broadcast(flat, 0)
        for part, tensor in zip(torch.split(flat, [tensor.numel() for tensor in some]), some, strict=True):
            tensor.copy_(part.view(tensor.shape))


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one exchange. Each must be without gaps in memory and laid
    out the same everywhere, as parameters and their gradients are.
    """
    if _joined.count == 1 or not tensors:
        return
    # In the order of memory; otherwise each channels-last tensor would be copied by a launch of its own.
    rows = [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    flat = torch.cat(rows)
    dist.all_reduce(flat)
    torch._foreach_copy_(rows, torch.split(flat, [len(row) for row in rows]))


def total(values: Tensor) -> Tensor:
    """Return the sum of `values` over its elements and over all processes, 0-d; see `summed`."""
    return summed(values.sum())


def summed(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes. Differentiable, also twice and in forward mode; the loss that is
    differentiated is then the sum of all processes' losses.
    """
    if _joined.count == 1:
        return values
    result: Tensor = _Summed.apply(values)  # type: ignore[no-untyped-call]
    return result


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor) -> Tensor:
        result = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(result)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: the sum is linear."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return summed(grad)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return summed(tangent)


def part_of(n: int) -> slice:
    """Return the rows, of n, that this process works on. The parts of all processes follow one another. Fewer rows than
    processes are not shared out.
    """
    if n < _joined.count:
        return slice(0, n)
    ends = [n * r // _joined.count for r in range(_joined.count + 1)]
    return slice(ends[_joined.rank], ends[_joined.rank + 1])


def whole_of(part: Tensor, n: int) -> Tensor:
    """Return all n rows in every process, where each has its `part_of` them. part: [rows, ...]."""
    if _joined.count == 1 or n < _joined.count:
        return part
    most = -(-n // _joined.count)
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(_joined.count)]
    dist.all_gather(parts, padded)
    sizes = [n * (r + 1) // _joined.count - n * r // _joined.count for r in range(_joined.count)]
    return torch.cat([rows[:size] for rows, size in zip(parts, sizes, strict=True)])


def check_same(what: str, digest: Callable[[], str]) -> None:
    """Raise RuntimeError unless `digest` returns the same in all processes. what: what it is a digest of."""
    if _joined.count == 1:
        return
    digests: list[Any] = [None] * _joined.count
    dist.all_gather_object(digests, digest())
    if len(set(digests)) > 1:
        raise RuntimeError(f"{what}: not the same on all ranks ({', '.join(digests)})")
