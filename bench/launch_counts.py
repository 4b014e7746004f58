"""What a call of a kernel or of a peer asks of a GPU, counted without one: launches, waits of the host, bytes.

Nothing here is timed, and every count comes from running the code:

- operators of torch: by a dispatch mode. One that is no view and writes a tensor is one launch. Bytes: every element
  of its inputs once, of its outputs once.
- Triton kernels of fastil and Liger-Kernel: in Triton's interpreter, whose loads and stores are recorded. Bytes:
  the distinct addresses that a launch reads, and those that it writes.
- torch.compile: the Triton code that Inductor generates for an H100, which stands there as a set of properties; bytes
  as Inductor states them for each generated kernel.

So a byte that a launch reads twice counts once: whether the second read leaves the caches is for a clock to say. What
an operator does inside, such as zeroing the output of nll_loss_backward, counts neither as a launch nor as bytes, and
only reads of a device value by the host count as waits, not copies of constants to the device: the figures of the
peers are lower bounds. The seed of the backward pass lies ready for everybody.

The interpreter and Inductor's code generator cannot share a process. `bench.kernels` runs this file once for each,
`python -m bench.launch_counts interpreted` and `... compiled`, writes what is wanted to its input, and reads the JSON
that it prints.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import Case
from bench.code_for_h100 import for_h100
from bench.contestants import COMPILED, FASTIL, KERNELS, Contestant, entrants

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
INTERPRETED_ROWS = (4, 8)  # batch sizes that are run; a call's bytes lie on the line through them


@dataclass
class Count:
    """The counts of one call. bytes: of each launch, in order. waits: how often the host reads a value from the
    device."""

    bytes: list[float] = field(default_factory=list)
    waits: int = 0


def elements(tensor: Tensor) -> int:
    """Return the elements in memory: an expanded axis counts once."""
    return int(np.prod([n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride], dtype=np.int64))


def tensors(values: Any) -> list[Tensor]:
    """Return the tensors among nested values."""
    return [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, Tensor)]


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run inside. Operators of fastil run their Triton form, in the interpreter."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = Count()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fastil":
            with self:
                return func.redispatch(CUDA, *args, **kwargs)
        result = func(*args, **kwargs)
        if not self.paused:
            self.operator(func, args, kwargs, result)
        return result

    def operator(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Count the launch, bytes and waits of an operator."""
        name = func._schema.name.split("::")[1]
        if name in ("_local_scalar_dense", "equal"):
            self.count.waits += 1
        written = tensors(result)
        if not written:  # in place on lists, such as _fused_sgd_; gradients may be changed there, but are not
            places = zip(func._schema.arguments, args, strict=False)
            written = tensors([a for place, a in places if place.is_write and place.name != "grads"])
        # empty, empty_like, new_empty, ... only allocate; lift_fresh hands a constant over.
        if name != "equal" and (not written or func.is_view or "empty" in name or name == "lift_fresh"):
            return
        read = list(args)
        if name == "nll_loss_forward":
            read[0] = args[1].to(args[0].dtype)  # of the log-probabilities, one per target
        elif name == "nll_loss_backward":
            del read[1]  # the log-probabilities give a shape only
        elif name in ("copy_", "fill_", "zero_"):
            del read[0]
        once = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors([read, kwargs])}
        self.count.bytes.append(sum(elements(t) * t.element_size() for t in [*once.values(), *written]))


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Count everything that runs inside; needs Triton's interpreter."""
    from triton.runtime import interpreter

    counter = Counter()
    builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
    load, store, run = builder.create_masked_load, builder.create_masked_store, function.run
    convert = interpreter._implicit_cvt
    touched: dict[tuple[str, int], list[Any]] = {}

    def note(kind: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        touched.setdefault((kind, size), []).append(pointers.data[mask.data])

    def recorded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def recorded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def recorded_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        touched.clear()
        counter.paused = True  # the interpreter's own use of torch
        result = run(self, *args, **kwargs)
        counter.paused = False
        distinct = (size * len(np.unique(np.concatenate(parts))) for (_, size), parts in touched.items())
        counter.count.bytes.append(sum(distinct))
        return result

    def float32_argument(value: Any) -> Any:
        """Return a number as a kernel on a GPU gets it; the interpreter passes Python's float, which Liger cannot
        cast."""
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), interpreter.tl.float32)
        return interpreter.tl.tensor(handle, interpreter.tl.float32)

    with (
        mock.patch.object(interpreter, "_implicit_cvt", float32_argument),
        mock.patch.object(builder, "create_masked_load", recorded_load),
        mock.patch.object(builder, "create_masked_store", recorded_store),
        mock.patch.object(function, "run", recorded_run),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),  # which a launch makes the current one
        counter,
    ):
        yield counter.count


def count_call(contestant: Contestant, case: Case) -> Count:
    """Return the count of one call of a contestant."""
    call = KERNELS[case.kernel].make(case, torch.device("cpu"), 0)
    with counted() as count:
        contestant(call)
    return count


def along_the_line(counts: dict[int, Count], batch: int) -> Count:
    """Return the count at `batch` rows from those at two other sizes: bytes are linear in the rows."""
    (rows, few), (more_rows, more) = counts.items()
    if (len(few.bytes), few.waits) != (len(more.bytes), more.waits):
        raise ValueError("the number of launches or waits depends on the number of rows")
    share = (batch - rows) / (more_rows - rows)
    return Count([a + (b - a) * share for a, b in zip(few.bytes, more.bytes, strict=True)], few.waits)


@functools.cache
def count_few(name: str, case: Case) -> Count:
    """Return the count of one call of a contestant, once for every case."""
    return count_call(entrants(KERNELS[case.kernel], (name,), None)[name], case)


def count_interpreted(name: str, case: Case) -> Count:
    """Return the count of one call of a contestant without torch.compile."""
    if name in KERNELS[case.kernel].by_data:
        return count_few(name, case)
    return along_the_line({rows: count_few(name, replace(case, batch=rows)) for rows in INTERPRETED_ROWS}, case.batch)


def count_compiled(case: Case) -> Count:
    """Return the counts of torch.compile in its default mode: launches in the Triton code that Inductor makes for an
    H100."""
    count, kernel = Count(), KERNELS[case.kernel]
    assert kernel.compiled is not None

    def read_code(graph: Any) -> None:
        code = graph.codegen()[0].value
        launches = re.findall(r"\.run\(.*stream=|extern_kernels\.\w+\(|torch\.ops\.\w+\.\w+\.\w+\(", code)
        nodes = [node for node in graph.scheduler.nodes if type(node).__name__ != "NopKernelSchedulerNode"]
        moved = [node.get_read_write_buffers_sizes() for node in nodes]
        if len(moved) != len(launches):
            raise ValueError(f"{len(launches)} launches in the code of {len(moved)} scheduled kernels")
        count.bytes.extend(moved)

    with for_h100(read_code) as backend:
        contestant = kernel.compiled(functools.partial(torch.compile, backend=backend, dynamic=False))
        contestant(kernel.make(case, torch.device("cpu"), 0))
    return count


def counts(part: str, case: Case, peers: tuple[str, ...]) -> dict[str, Any]:
    """Return the counts of a case by contestant, or why there is none; of fastil there must be one."""
    found: dict[str, Any] = {}
    kernel = KERNELS[case.kernel]
    for name in (FASTIL, *peers):
        try:
            if part == "compiled" and name == COMPILED and kernel.compiled is not None:
                found[name] = asdict(count_compiled(case))
            elif part == "interpreted" and name in kernel.contestants:
                found[name] = asdict(count_interpreted(name, case))
        except Exception as error:
            if name == FASTIL:
                raise
            found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return found


def main() -> None:
    """Count one part of the cases and peers that standard input names, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("interpreted", "compiled"))
    part = parser.parse_args().part
    if part == "interpreted" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1: Triton chooses its interpreter when it is imported")
    torch.set_num_threads(1)
    wanted = json.load(sys.stdin)
    print(json.dumps([counts(part, Case(**case), tuple(wanted["peers"])) for case in wanted["cases"]]))


if __name__ == "__main__":
    main()
