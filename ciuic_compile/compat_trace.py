"""Trace what a codec does, and write it into a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from .compat import is_getitem, is_view

aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """What a function does.

    Attributes:
        own: the nodes of which each copy needs a fake value of its own: what shows an input's storage, and
            all where there are kernels. With one value, Inductor would take two copies of a kernel for
            writers of one storage, and run one of them on a clone of its (empty) output.
    """

    graph: fx.Graph
    own: frozenset[fx.Node]


def trace(
    fn: Callable[..., tuple[torch.Tensor, ...]], args: Sequence[fx.Node], kernels: bool = True
) -> Trace:
    """Trace ``fn`` on the nodes' fake values.

    Inductor's decompositions apply, and kernels become ``triton_kernel_wrapper_functional`` nodes, which
    Inductor sees through.

    Args:
        kernels: whether it may call any; where not, and nothing is written in place, it takes less time.
    """
    if not kernels:
        traced = _traced(fn, args)
        if any(_writes(node.target) for node in traced.nodes):
            kernels = True
    if kernels:
        traced = _traced(dispatch_functionalize(fn), args)
    if any(isinstance(n.target, torch._ops.HigherOrderOperator) for n in traced.nodes):
        return Trace(traced, frozenset(traced.nodes))
    graph = _shortened(traced)
    shown = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if (is_view(node) or is_getitem(node)) and shown.intersection(node.all_input_nodes):
            shown.add(node)
    return Trace(graph, frozenset(shown))


def _traced(fn: Callable[..., tuple[torch.Tensor, ...]], args: Sequence[fx.Node]) -> fx.Graph:
    values = [a.meta["val"] for a in args]
    fake_mode = next(v.fake_mode for v in values if isinstance(v, torch.Tensor))  # type: ignore[attr-defined]
    with fake_mode:
        traced = make_fx(
            fn,
            decomposition_table=select_decomp_table(),
            tracing_mode="symbolic",
            _allow_non_fake_inputs=True,
        )(*values)
    traced.graph.eliminate_dead_code()
    return traced.graph


def _writes(target: object) -> bool:
    """Whether a call writes into what it is given, or may."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator)


def _shortened(graph: fx.Graph) -> fx.Graph:
    """A trace without what is computed twice or changes nothing: its nodes are copied for every tensor."""
    unchanged = graph.find_nodes(op="call_function", target=aten.alias.default)
    unchanged += [
        node
        for node in graph.find_nodes(op="call_function", target=aten.permute.default)
        if node.args[1] == list(range(len(node.args[1])))
    ]
    output = graph.output_node()
    for node in unchanged:  # a result is never the input itself, whose node is the user's
        node.replace_all_uses_with(node.args[0], delete_user_cb=lambda user: user is not output)
    graph.eliminate_dead_code()
    return fx_graph_cse(graph)


def inline(graph: fx.Graph, before: fx.Node, traced: Trace, args: Sequence[fx.Node]) -> list[fx.Node]:
    """Copy a traced function's nodes into ``graph`` before a node; return the nodes of its results."""
    environment = dict(zip(traced.graph.find_nodes(op="placeholder"), args, strict=True))
    origin = {
        k: v for k, v in before.meta.items() if k in ("stack_trace", "nn_module_stack", "autograd_backward")
    }
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "call_function":
                copy = graph.node_copy(node, environment.__getitem__)
                copy.meta.update(origin)
                if node in traced.own:
                    copy.meta["val"] = _own_value(copy, node)
                environment[node] = copy
            elif node.op not in ("placeholder", "output"):
                raise AssertionError(
                    f"a codec may not use {node.op} nodes ({node.target}): pass constants as arguments"
                )
    (results,) = traced.graph.output_node().args
    assert isinstance(results, (tuple, list))
    return [environment[n] for n in results if isinstance(n, fx.Node)]


def _own_value(node: fx.Node, traced: fx.Node) -> Any:
    """A copy of a traced node's fake value in a storage of its own; views stay views of their input's."""
    if is_getitem(node):
        source, key = node.args
        assert isinstance(source, fx.Node)
        return source.meta["val"][key]
    value = node.meta["val"]
    if isinstance(value, FakeTensor) and not is_view(node):
        return fresh(value)  # most are this
    tensors = [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, FakeTensor)]
    if tensors and is_view(node):
        if (viewed := _viewed(node, traced)) is not None:
            return viewed
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        with tensors[0].fake_mode:
            return node.target(*args, **kwargs)
    return torch.utils._pytree.tree_map_only(FakeTensor, fresh, value)


def _viewed(node: fx.Node, traced: fx.Node) -> FakeTensor | None:
    """The view of its first input's storage that the traced node has of its own; None for dynamic sizes."""
    value, source, origin = traced.meta["val"], node.args[0], traced.args[0]
    if not (isinstance(value, FakeTensor) and isinstance(source, fx.Node) and isinstance(origin, fx.Node)):
        return None
    base, before = source.meta["val"], origin.meta["val"]
    offset = value.storage_offset() - before.storage_offset() + base.storage_offset()
    sizes = (*value.shape, *value.stride(), offset)
    if not all(type(s) is int for s in sizes):
        return None
    with torch._C._DisableTorchDispatch():
        like = torch.empty(0, dtype=value.dtype, device="meta")
        like.set_(base.untyped_storage(), offset, value.shape, value.stride())
        return FakeTensor(value.fake_mode, like, value.device)


def fresh(value: Any) -> Any:
    """A fake tensor like another, made without the fake mode's dispatch, which took most of the time."""
    with torch._C._DisableTorchDispatch():
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return FakeTensor(value.fake_mode, like, value.device)
