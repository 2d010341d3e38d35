"""What Inductor generates for a GPU, on a machine that has none: kernels, buffers, instructions an element.

    python -m bench.generated --model llama --mode 4:1 [--graph backward] [--source] [--sass]

Needs a CUDA build of torch (2.11 and its Triton were used), but neither a GPU nor a driver. The joint graph
is traced and partitioned on the CPU, as :mod:`ciuic_compile.compat_cuda` has it; its values are then declared
to be on a Hopper GPU, and codecs, passes and Inductor's code generation run as they would there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import re
import subprocess
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.scheduler
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from bench.models import MODELS, WithLoss
from ciuic_compile import backend, compat_trace, compat_wrapper, partitioner
from ciuic_compile.analyze import MemoryModel
from ciuic_compile.codecs import _group
from ciuic_compile.compat_cuda import as_cuda
from ciuic_compile.compat_extract import Extractor
from ciuic_compile.compat_order import ByLastValue
from ciuic_compile.passes import Graphs
from ciuic_compile.replay import Trace
from ciuic_compile.types import Plan

CUDA = torch.device("cuda", 0)
HOPPER = {
    "multi_processor_count": 132, "major": 9, "minor": 0, "warp_size": 32, "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
}  # fmt: skip
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)


class _Done(Exception):
    """Raised once the graphs are rewritten: nothing is to be run."""


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """torch and Triton believe in one Hopper GPU; nothing may be run on it."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    properties = types.SimpleNamespace(name="Hopper", total_memory=2**37, L2_cache_size=2**25, **HOPPER)
    hints = {k: v for k, v in HOPPER.items() if k != "minor"}
    device = DeviceProperties(type="cuda", index=0, cc=90, **hints)
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
    )

    def answer(value: object) -> Callable[..., object]:
        return lambda *args, **kwargs: value

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "is_available", answer(True)),
            (torch.cuda, "device_count", answer(1)),
            (torch.cuda, "current_device", answer(0)),
            (torch.cuda, "get_device_properties", answer(properties)),
            (torch.cuda, "get_device_capability", answer((9, 0))),
            (torch.cuda, "get_device_name", answer("Hopper")),
            (torch.cuda, "synchronize", answer(None)),
            (torch.cuda, "_lazy_init", answer(None)),
            (torch._subclasses.fake_tensor, "init_gpu_context", answer(None)),
            (torch._inductor.scheduler, "has_triton", answer(True)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(answer(properties))),
            (CudaInterface, "get_compute_capability", staticmethod(answer(90))),
            (CudaInterface, "is_triton_capable", staticmethod(answer(True))),
            (CudaInterface, "raise_if_triton_unavailable", staticmethod(answer(None))),
            (DeviceProperties, "create", classmethod(answer(device))),
            (triton.runtime.driver, "_active", driver),
            (torch._C, "_conv_determine_backend_memory_format", _cudnn_layout),
            (_group, "resolve_impl", lambda impl, _: "reference" if impl == "reference" else "kernel"),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=name == "_active"))
        yield


def _cudnn_layout(image: torch.Tensor, weight: torch.Tensor, _: object) -> torch.memory_format:
    """The layout that cuDNN returns, which torch asks cuDNN for (ConvUtils.h)."""
    formats = map(torch._prims_common.suggest_memory_format, (image, weight))
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def on(device: torch.device, graph: fx.Graph) -> None:
    """Declare every value of a graph to be on ``device``."""

    def moved(value: torch.Tensor) -> torch.Tensor:
        with value.fake_mode:  # type: ignore[attr-defined]
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map_only(torch.Tensor, moved, node.meta["val"])
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}


@dataclass(frozen=True)
class Planned:
    """A training step as it was planned for the pretended GPU, and its graphs after all passes.

    ``by_last``: the backward's kernels are to run in the order of ``compat_order.py``.
    """

    plan: Plan
    model: MemoryModel
    graphs: Graphs
    by_last: bool


def rewritten(model: torch.nn.Module, mode: str, *inputs: torch.Tensor, **options: Any) -> Planned:
    """Plan and rewrite a training step on the pretended GPU, under more options; nothing is run."""
    found: list[Planned] = []
    real_plan, real_trace = partitioner.plan_and_rewrite, compat_trace.trace

    def plan(name: str, model: Any, selection: Any, baseline: Any, graphs: Graphs, *rest: Any) -> Any:
        on(CUDA, graphs.forward.graph)
        on(CUDA, graphs.backward.graph)
        with pretended_gpu(), mock.patch.object(compat_trace, "trace", trace):
            draft = partitioner.make_draft(model, selection, graphs)
            made = real_plan(name, model, selection, baseline, graphs, 0, draft)
        found.append(Planned(made, model, graphs, draft.planned.by_last))
        raise _Done

    def trace(fn: Any, args: Any, kernels: bool) -> compat_trace.Trace:
        """On the CPU, where no device guard runs."""
        graph = fx.Graph()
        stand_ins = [graph.placeholder(f"x{i}") for i in range(len(args))]
        for stand_in, node in zip(stand_ins, args, strict=True):
            stand_in.meta["val"] = node.meta["val"]
        on(torch.device("cpu"), graph)
        with mock.patch.object(_group, "GROUP_ORDER", ()):
            traced = real_trace(fn, stand_ins, kernels)
        on(CUDA, traced.graph)
        return traced

    with (
        mock.patch.object(partitioner, "plan_and_rewrite", plan),
        inductor_config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        contextlib.suppress(_Done, torch._dynamo.exc.BackendCompilerFailed),
    ):
        torch._dynamo.reset()
        torch.compile(model, backend="ciuic", options={"mode": mode, "report": "off", **options})(*inputs)
    if not found:
        raise SystemExit("no training graph was planned; is this a CUDA build of torch?")
    return found[0]


def own_partition(model: MemoryModel) -> Graphs:
    """Inductor's own partition of a joint graph, on the pretended GPU."""
    captured = model.captured
    assert captured.graph.owning_module is not None
    extract = Extractor(captured.graph.owning_module, captured.info, captured.num_fwd_outputs)
    graphs = Graphs(*extract(captured.baseline_saved), captured.num_fwd_outputs)
    on(CUDA, graphs.forward.graph)
    on(CUDA, graphs.backward.graph)
    return graphs


@dataclass(frozen=True)
class Generated:
    """What Inductor made of one graph: its code, what that allocates, the strides of what it returns."""

    code: str
    trace: Trace | None
    strides: tuple[Sequence[int] | None, ...]


def generated(
    gm: fx.GraphModule,
    strides: Mapping[str, Sequence[int]] | None = None,
    donated: Collection[str] | None = None,
    by_last: bool = False,
) -> Generated:
    """Lower one graph.

    Args:
        strides: of inputs by name, where Inductor's forward returns others than the trace did.
        donated: inputs of a backward that it may overwrite; None for a forward.
        by_last: whether a backward's kernels are to run in the order of ``compat_order.py``.
    """
    from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape

    inputs = gm.graph.find_nodes(op="placeholder")
    tensors = (n.meta["val"] for n in inputs)
    fake_mode = next(v.fake_mode for v in tensors if isinstance(v, torch.Tensor))  # type: ignore[attr-defined]
    with fake_mode:
        for node in inputs:
            given = (strides or {}).get(node.name)
            if given is not None:
                old = node.meta["val"]
                node.meta["val"] = torch.empty_strided(old.shape, given, dtype=old.dtype, device=old.device)
    values = [n.meta["val"] for n in inputs]
    with (
        pretended_gpu(),
        inductor_config.patch(backend.CUDA_PATCHES),
        inductor_config.patch(_post_fusion_custom_pass=ByLastValue(lambda: by_last, None)),
        torch.no_grad(),
        fake_mode,
        V.set_fake_mode(fake_mode),
        V.set_debug_handler(DebugContext()),
        compat_wrapper.recorded() as recording,
    ):
        view_to_reshape(gm)
        FakeTensorProp(gm, mode=fake_mode).propagate_dont_convert_inputs(*values)
        output = gm.graph.output_node()
        results = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in output.args[0]]  # type: ignore[union-attr]
        output.meta["original_output_strides"] = [
            r.stride() if isinstance(r, torch.Tensor) else None for r in results
        ]
        output.meta["user_visible_output_idxs"] = []
        post_grad_passes(gm, False)
        lowering = GraphLowering(
            gm, example_inputs=values, shape_env=fake_mode.shape_env, is_backward=donated is not None
        )
        if donated is not None:
            lowering.bw_donated_idxs = [i for i, n in enumerate(inputs) if n.name in donated]
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*values)
            code, _ = lowering.codegen()
    returned = tuple(_strides(value) for value in lowering.graph_outputs or ())
    trace = recording.forward if donated is None else recording.backward
    return Generated(str(getattr(code, "value", code)), trace, returned)


def _strides(value: Any) -> Sequence[int] | None:
    stride = value.maybe_get_stride() if hasattr(value, "maybe_get_stride") else None
    return None if stride is None else [int(s) for s in stride]


def instructions(source: str, warps: int = 4, **blocks: int) -> Counter[str]:
    """SASS instructions by name of one of Inductor's kernels, compiled with these block sizes."""
    import triton
    from triton.backends.compiler import GPUTarget

    signature: dict[str, str] = eval(re.search(r"'signature': (\{.*?\})", source)[1])  # type: ignore[index]
    body = source.replace("triton_helpers.set_driver_to_gpu()", "")
    body = re.sub(r"@triton_heuristics\.\w+\((?:.|\n)*?\n\)\n@triton\.jit", "@triton.jit", body)
    with tempfile.TemporaryDirectory() as folder, pretended_gpu():
        path = Path(folder) / "generated_kernel.py"
        path.write_text(body)
        spec = importlib.util.spec_from_file_location("generated_kernel", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        name = re.findall(r"^def (\w+)\(", body, re.MULTILINE)[-1]
        sizes = {"XBLOCK": 1, "RSPLIT_SIZE": 64, "NUM_STAGES": 1, **blocks}
        constants = {k: sizes[k] for k, kind in signature.items() if kind == "constexpr" and k in sizes}
        pointers = [i for i, kind in enumerate(signature.values()) if kind != "constexpr"]
        aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
        kernel = triton.compiler.ASTSource(getattr(module, name), signature, constants, aligned)
        target = GPUTarget("cuda", 90, 32)
        cubin = triton.compile(kernel, target=target, options={"num_warps": warps}).asm["cubin"]
        (Path(folder) / "kernel.cubin").write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        listing = subprocess.run(
            [tool, "-sass", Path(folder) / "kernel.cubin"], capture_output=True, text=True, check=True
        ).stdout
    words = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?(\w+)", listing)
    return Counter(words)


def main() -> None:
    """Print the kernels and the calls of one graph."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama", choices=list(MODELS))
    parser.add_argument("--size", default="small", choices=("tiny", "small", "full"))
    parser.add_argument("--mode", default="4:1")
    parser.add_argument("--graph", default="backward", choices=("forward", "backward"))
    parser.add_argument("--source", action="store_true", help="print all of the generated code")
    parser.add_argument("--sass", action="store_true", help="count the instructions of elementwise kernels")
    args = parser.parse_args()
    built, batches, loss_fn = MODELS[args.model](args.size)
    model = WithLoss(built, loss_fn).to(torch.bfloat16)
    inputs, targets = batches(0, torch.device("cpu"))
    inputs = inputs.to(torch.bfloat16) if inputs.is_floating_point() else inputs
    with as_cuda():
        graphs = rewritten(model, args.mode, inputs, targets).graphs
    code = generated(getattr(graphs, args.graph)).code
    if args.source:
        print(code)
        return
    for name, source in KERNEL.findall(code):
        print(name)
        if args.sass and name.startswith("triton_poi"):
            counts = instructions(source, XBLOCK=1024, YBLOCK=1)  # 128 threads: 8 elements each
            print(
                f"    {sum(counts.values()) / 8:.0f} instructions an element: {dict(counts.most_common(8))}"
            )
    wanted = ("empty_strided", ".run(", "extern_kernels", "torch.ops")
    for line in code[code.index("def call") :].splitlines():
        if any(word in line for word in wanted):
            print("   ", line.strip()[:150])


if __name__ == "__main__":
    main()
