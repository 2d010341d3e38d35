"""A small model taken through the real stages in-process, without code generation, and kept for inspection.

Dynamo, AOTAutograd, Inductor's joint passes and the partitioner hook are the real ones; where Inductor would
generate code, the graph itself is run. ``stage`` stops before the rewrite, so a test can do the rest.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ciuic_compile import analyze as analyze_module
from ciuic_compile import compat, partitioner
from ciuic_compile.analyze import MemoryModel, analyze
from ciuic_compile.capture import CapturedGraph
from ciuic_compile.config import parse_options
from ciuic_compile.devices import named
from ciuic_compile.partitioner import CiuicPartitioner
from ciuic_compile.passes import Graphs
from ciuic_compile.planner import Selection
from ciuic_compile.simulate import Peaks
from ciuic_compile.types import Plan

SMALL: dict[str, Any] = {"min_bytes": 0, "report": "off"}


@dataclass
class Stage:
    """What the partitioner saw and made of one training graph, before the rewrite.

    Attributes:
        inputs: what the forward graph was called with, one tuple a call (empty when it did not run).
    """

    model: MemoryModel
    selection: Selection
    baseline: Peaks
    untouched: Graphs
    inputs: list[list[Any]] = field(default_factory=list)

    @property
    def captured(self) -> CapturedGraph:
        """The joint graph."""
        return self.model.captured

    def node(self, name: str) -> fx.Node:
        """The joint-graph node called ``name``."""
        return next(n for n in self.captured.graph.nodes if n.name == name)

    def nodes(self, target: object) -> list[fx.Node]:
        """Joint-graph nodes, forward ones only, whose op (with or without overload) is ``target``."""
        return [
            n
            for n in self.captured.savable
            if n.target is target or getattr(n.target, "overloadpacket", None) is target
        ]

    def graphs(self) -> Graphs:
        """A fresh copy of the partitioned graphs, for passes to rewrite."""
        return copy_graphs(self.untouched)


@contextlib.contextmanager
def memory_of_the_device(nbytes: int) -> Iterator[None]:
    """Plan for a CPU whose memory is so large."""
    profile = replace(named("cpu"), memory_bytes=nbytes)
    with mock.patch.object(analyze_module, "profile_for", return_value=profile):
        yield


def copy_graphs(graphs: Graphs) -> Graphs:
    """An independent copy of a pair of graphs (fake tensors are shared)."""
    pair = [fx.GraphModule(g, copy.deepcopy(g.graph)) for g in (graphs.forward, graphs.backward)]
    return Graphs(pair[0], pair[1], graphs.num_fwd_outputs)


def stage(
    function: Callable[..., Any],
    *inputs: Any,
    dynamic: bool = False,
    backward: Callable[[Any], object] | None = None,
    **options: Any,
) -> Stage:
    """Compile ``function``, run it and its backward once, and return what the partitioner saw.

    Args:
        backward: runs the backward, given the function's result; by default of the sum of the result(s).
        options: ciuic's options; ``min_bytes`` is 0 unless given.
    """
    (only,) = stages(function, *inputs, dynamic=dynamic, backward=backward, **options)
    return only


def stages(
    function: Callable[..., Any],
    *inputs: Any,
    dynamic: bool = False,
    backward: Callable[[Any], object] | None = None,
    **options: Any,
) -> list[Stage]:
    """As :func:`stage`, for functions that compile to several graphs."""
    config = parse_options({**SMALL, **options})
    found: list[Stage] = []

    def record(
        name: str, model: MemoryModel, selection: Selection, baseline: Peaks, graphs: Graphs, *rest: object
    ) -> Plan | None:
        found.append(Stage(model, selection, baseline, copy_graphs(graphs)))
        return None

    def run_graph(gm: fx.GraphModule, example_inputs: Sequence[object], **kwargs: Any) -> Any:
        seen = found[-1].inputs if found and not kwargs.get("is_backward") else []

        def call(args: list[Any]) -> Any:
            seen.append(list(args))
            return gm(*args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        part = CiuicPartitioner(config, "test", "graph")
        return compile_fx(
            gm,
            example_inputs,
            inner_compile=run_graph,
            config_patches={**config.inductor_options, "custom_partitioner_fn": part},
        )

    torch._dynamo.reset()
    with (
        mock.patch.object(partitioner, "plan_and_rewrite", record),
        functorch_config.patch(enable_autograd_cache=False, donated_buffer=False),
    ):
        result = torch.compile(function, backend=backend, dynamic=dynamic or None)(*inputs)
        if backward is None:
            outputs = result if isinstance(result, (tuple, list)) else [result]
            sum(o.sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad).backward()  # type: ignore[union-attr]
        else:
            backward(result)
    return found


@torch.no_grad()
def run_pair(graphs: Graphs, inputs: Sequence[Any], seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Run both graphs as AOTAutograd would, values handed over by name; (all forward outputs, gradients).

    Tangents are random numbers of a fixed seed, so two rewrites of one pair can be compared.
    """
    torch.manual_seed(seed)  # for random ops in the forward
    outputs = list(fx.Interpreter(graphs.forward).run(*inputs))
    names = [n.name if isinstance(n, fx.Node) else "" for n in graphs.forward_outputs()]
    primals = [n.name for n in graphs.forward.graph.find_nodes(op="placeholder")]
    known = {**dict(zip(primals, inputs, strict=True)), **dict(zip(names, outputs, strict=True))}
    generator = torch.Generator().manual_seed(seed)
    arguments = []
    for node in graphs.backward.graph.find_nodes(op="placeholder"):
        if node.name in known:
            arguments.append(known[node.name])
        else:
            assert "tangents" in node.name, (
                f"the backward wants {node.name}, which the forward does not return"
            )
            value = outputs[_tangent_output(graphs, node)]
            arguments.append(torch.randn(value.shape, generator=generator).to(value.dtype))
    return outputs, list(fx.Interpreter(graphs.backward).run(*arguments))


def _tangent_output(graphs: Graphs, tangent: fx.Node) -> int:
    """Which user output a tangent belongs to: the n-th floating point one of its shape."""
    index = int(tangent.name.split("_")[1]) - 1
    differentiable = [
        i
        for i, n in enumerate(graphs.forward_outputs()[: graphs.num_fwd_outputs])
        if isinstance(n, fx.Node) and n.meta["val"].dtype.is_floating_point
    ]
    return differentiable[index]


def differ(a: Sequence[Any], b: Sequence[Any]) -> list[float]:
    """Relative error of each tensor of ``b`` against ``a``; 0.0 for anything else that is equal."""
    errors = []
    for left, right in zip(a, b, strict=True):
        if isinstance(left, Tensor):
            assert left.shape == right.shape and left.dtype == right.dtype
            gap = (left.double() - right.double()).norm()
            errors.append(0.0 if gap == 0 else float(gap / left.double().norm()))
        else:
            assert left == right
            errors.append(0.0)
    return errors


class HandMade:
    """A joint graph written by hand: fake CPU tensors, no autograd, names and structure of one's choice."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.mode = FakeTensorMode(shape_env=ShapeEnv())

    def placeholder(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        """An input, e.g. ``primals_1`` or ``tangents_1``."""
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def call(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """A call whose value is what the op gives on the arguments' fake values."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)

        def value(n: fx.Node) -> Any:
            return n.meta["val"]

        with self.mode:
            node.meta["val"] = target(
                *torch.fx.node.map_arg(args, value), **torch.fx.node.map_arg(kwargs, value)
            )
        return node

    def output(self, *values: fx.Node | None) -> fx.Graph:
        """End the graph."""
        self.graph.output(tuple(values))
        return self.graph

    def captured(
        self,
        outputs: Sequence[fx.Node],
        gradients: Sequence[fx.Node | None],
        baseline: Sequence[fx.Node] = (),
        static: Sequence[int] = (),
    ) -> CapturedGraph:
        """End the graph as a joint graph and classify its nodes with torch's own ``classify_nodes``."""
        graph = self.output(*outputs, *gradients)
        gm = fx.GraphModule(torch.nn.Module(), graph)
        info = compat._partitioners.classify_nodes(gm, list(static), len(outputs))
        return CapturedGraph(gm.graph, info, tuple(baseline), len(outputs))

    def model(self, captured: CapturedGraph, **options: Any) -> MemoryModel:
        """The memory model under these options (``min_bytes`` 0 unless given)."""
        return analyze(captured, parse_options({**SMALL, **options}))


def by_name(nodes: Sequence[fx.Node] | Mapping[fx.Node, object]) -> set[str]:
    """The nodes' names."""
    return {n.name for n in nodes}
