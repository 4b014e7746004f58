"""The code that torch.compile generates for an H100, on a machine without a GPU."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

H100 = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32, gcnArchName="",
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232448,
)  # fmt: skip


class CodeIsThere(BaseException):
    """Ends Inductor's work before it would load the code onto the GPU."""


@contextlib.contextmanager
def for_h100(read_code: Callable[[Any], None]) -> Iterator[Callable[..., Any]]:
    """A backend of torch.compile that hands the lowered graph of everything it compiles, moved to an H100, to
    `read_code`. Nothing is computed: what it returns has the right shapes, and any content. cuDNN is taken for
    convolutions, in channels-last, as a CUDA build does; a CPU build would plan copies of the layout that it does not
    need.
    """
    from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._subclasses import FakeTensorMode
    from torch.fx.node import map_aggregate
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    cuda, cudnn = torch.device("cuda", 0), torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]

    def lowered(graph: Any) -> None:
        read_code(graph)
        raise CodeIsThere

    def on_the_gpu(module: Any, inputs: Any, **keys: Any) -> Any:
        """Generate code for a copy of the graph that lives on the GPU."""
        moved = torch.fx.GraphModule(module, copy.deepcopy(module.graph))
        for node in moved.graph.nodes:
            node.args, node.kwargs = (
                map_aggregate(v, lambda leaf: cuda if isinstance(leaf, torch.device) else leaf)
                for v in (node.args, node.kwargs)
            )
        mode = FakeTensorMode()
        with mode:
            fake = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=cuda) for t in inputs]
        FakeTensorProp(moved, mode=mode).propagate(*fake)
        with contextlib.suppress(CodeIsThere), torch._guards.tracing(torch._guards.TracingContext(mode)):
            compile_fx_inner(moved, fake, is_backward=keys.get("is_backward", False))
        outputs = [getattr(node, "meta", {}).get("val") for node in module.graph.output_node().args[0]]

        def unfilled(*_: Any) -> list[Any]:
            return [None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in outputs]

        return make_boxed_func(unfilled)

    with contextlib.ExitStack() as patches:

        def put(owner: Any, name: str, value: Any) -> None:
            patches.enter_context(mock.patch.object(owner, name, value))

        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            put(owner, "get_device_properties", lambda device=None: H100)
        put(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        put(torch.cuda, "current_device", lambda: 0)
        put(CudaInterface, "get_compute_capability", lambda device=None: 90)
        put(CudaInterface, "is_available", lambda: True)
        put(CudaInterface, "is_bf16_supported", lambda including_emulation=False: True)
        put(CudaInterface, "raise_if_triton_unavailable", lambda device=None: None)
        put(torch.utils._triton, "triton_hash_with_backend", lambda: "none")
        put(torch._C, "_select_conv_backend", lambda *args, **kwargs: cudnn)
        put(torch._C, "_conv_determine_backend_memory_format", lambda *args: torch.channels_last)
        put(GraphLowering, "compile_to_module", lowered)
        patches.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        torch.compiler.reset()  # else the eighth shape would run uncompiled
        yield lambda module, inputs: compile_fx(module, inputs, inner_compile=on_the_gpu)
