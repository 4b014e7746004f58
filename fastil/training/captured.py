"""A training step whose inputs lie in the same places throughout a phase: a CUDA graph replays it, a CPU runs it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastil.data import Inputs

# Steps of a size that run as they are before one is captured: they compile kernels, choose algorithms and fill caches,
# none of which a capture allows.
WARM_UP = 3


class CapturedStep:
    """Calls `step` on copies of its inputs in buffers of its own, one set for each size of batch, which it is told too:
    where several processes share a batch, that of the whole.

    On CUDA the call is captured after a few steps and replayed from then on: hundreds of launches become one. So the
    step may depend on what lies in tensors, and on nothing else that changes while the phase lasts; the next one
    captures it again. A step that cannot be captured goes on as it is, and `failed` is told why, in one line. capture:
    whether to try.
    """

    def __init__(self, step: Callable[[Inputs, int], None], *, capture: bool, failed: Callable[[str], None]) -> None:
        self.step, self.capture, self.failed = step, capture, failed
        self.places: dict[int, Inputs] = {}
        self.done: Counter[int] = Counter()
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __call__(self, inputs: Inputs, size: int) -> None:
        if size not in self.places:
            self.places[size] = Inputs._make(None if new is None else torch.empty_like(new) for new in inputs)
        for kept, new in zip(self.places[size], inputs, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)
        if self.capture and self.done[size] == WARM_UP:
            self.begin_replay(size)
        self.done[size] += 1
        if size in self.graphs:
            self.graphs[size].replay()
        else:
            self.step(self.places[size], size)

    def begin_replay(self, size: int) -> None:
        """Capture the step for batches of this size. Nothing is computed meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # They are replayed one after the other and leave nothing in the pool, so they can share it.
        pool = next((other.pool() for other in self.graphs.values()), None)
        try:
            # Loaders work in threads of their own, which may go on allocating.
            with torch.cuda.graph(graph, pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self.step(self.places[size], size)
        except Exception as error:  # as many types as there are things that cannot be captured
            cause = error.__context__ or error  # ending a broken capture raises, too
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            self.failed(f"batches of {size} cannot be captured in a CUDA graph ({reason}): the step runs uncaptured")
            self.capture = False
            self.graphs.clear()
        else:
            self.graphs[size] = graph


def has_streams(device: torch.device) -> bool:
    """Whether work is queued on the device: not on a CPU, nor on a GPU that is only imagined, as tests do."""
    return device.type == "cuda" and torch.cuda.is_available()


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream of one's own inside, where the device has streams: the default one cannot be captured, and
    autograd remembers the stream on which it first accumulated a gradient."""
    if not has_streams(device):
        yield
        return
    outer = torch.cuda.current_stream(device)
    inner = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    inner.wait_stream(outer)
    try:
        with torch.cuda.stream(inner):
            yield
    finally:
        outer.wait_stream(inner)
