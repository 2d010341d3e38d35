"""Every use of torch's private names, and every difference between torch 2.11 and 2.13, lives here.

Line numbers and findings: docs/torch-internals.md.
"""

from __future__ import annotations

import copy
import gc
import importlib
import math
import operator
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import sympy
import torch
import torch._functorch.partitioners as _partitioners
from torch import fx
from torch._dynamo.exc import ShortenTraceback
from torch._functorch._aot_autograd.descriptors import (
    SavedForBackwardsAOTOutput,
    SavedForBackwardsNoVcCheckAOTOutput,
)
from torch._functorch.partitioners import NodeInfo, must_recompute
from torch._inductor.pattern_matcher import stable_topological_sort as sort
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.proxy_tensor import is_sym_node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils.checkpoint import CheckpointPolicy

from .by_op import by_op

__all__ = [
    "NodeInfo",
    "collecting_later",
    "copied",
    "hint",
    "is_collective",
    "is_recomputable",
    "is_random",
    "is_view",
    "is_symbolic",
    "must_recompute",
    "must_save",
    "partition_with",
    "renumber_saved_descs",
    "sort",
]

MOST_SIZE = 2**62  # bounds from here on are torch's way to say that there is none
Chooser = Callable[[fx.Graph, NodeInfo, Callable[[], list[fx.Node]]], list[fx.Node]]
_ops = _partitioners.get_default_op_list()
_FUSIBLE = frozenset(_ops.fusible_ops)
#: Pointwise in Inductor's lowering: more than what torch's partitioner calls fusible.
_POINTWISE = _FUSIBLE | {
    torch.ops.aten.select_scatter,
    torch.ops.aten.slice_scatter,
    torch.ops.aten.embedding,
    torch.ops.aten.full,
    torch.ops.prims.fma,
}


def partition_with(
    joint: fx.GraphModule, joint_inputs: Sequence[object], choose: Chooser, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Run torch's own min-cut partitioner, with ``choose`` in place of its choice of saved values.

    CSE, checkpoint tags, RNG functionalization, collectives, extraction and the backward's order
    stay torch's. The graph modules have no code: what is rewritten gets its code then.
    ``choose(joint_graph, node_info, baseline)`` returns the nodes to save;
    ``baseline()`` computes what torch would have saved. It is not called when nothing in the graph
    depends on the tangents (torch then uses its default partitioner).
    """
    original = _partitioners.choose_saved_values_set

    def chooser(graph: fx.Graph, info: NodeInfo, memory_budget: float = 1) -> list[fx.Node]:
        return choose(graph, info, lambda: original(graph, info, memory_budget=1))

    # Dynamo compiles under one global lock, so no other partition runs while this is patched.
    with mock.patch.object(_partitioners, "choose_saved_values_set", chooser), without_code():
        return _partitioners.min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph module, without code."""
    with without_code():
        return fx.GraphModule(gm, copy.deepcopy(gm.graph))


@contextmanager
def without_code() -> Iterator[None]:
    """Graph modules made here generate no Python code, a third of the time to make one of a large graph.

    Those of other threads do, which may trace something else meanwhile.
    """
    recompile, here = fx.GraphModule.recompile, threading.get_ident()

    def elsewhere(gm: fx.GraphModule) -> Any:
        return recompile(gm) if threading.get_ident() != here else None

    with mock.patch.object(fx.GraphModule, "recompile", elsewhere):
        yield


@contextmanager
def cheap_copies() -> Iterator[None]:
    """Nodes are copied here in half the time: without torch 2.13's search for symbolic sizes among arguments,
    of which it only warns, and the originals have been searched."""

    def node_copy(graph: fx.Graph, node: fx.Node, transform: Callable[..., Any] = lambda n: n) -> fx.Node:
        new: Any = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
        new._update_args_kwargs(fx.map_arg(node.args, transform), fx.map_arg(node.kwargs, transform))
        new.meta.update(node.meta)
        return new  # type: ignore[no-any-return]

    with mock.patch.object(fx.Graph, "node_copy", node_copy):
        yield


@contextmanager
def collecting_later() -> Iterator[None]:
    """No garbage collection here: graphs are all cycles, and each full collection walks every live one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def frees_tangents() -> bool:
    """Whether a compiled backward can free the gradients that it is given: before torch 2.13, autograd holds
    them until it returns."""
    return hasattr(torch.autograd.Function, "boxed_grads_call")


def must_save(node: fx.Node) -> bool:
    """Whether the user's checkpoint policy, or torch, says that this node is saved."""
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


@by_op
def is_view(target: Any) -> bool:
    """Whether a node's value aliases its first argument's storage."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in (torch.ops.aten._unsafe_view.default, torch.ops.aten.alias.default):
        return True
    returns = target._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not alias.is_write


def packet(node: fx.Node) -> object:
    """The op without its overload, e.g. ``aten.mm``; the target itself for other callables."""
    return packet_of(node.target)


def packet_of(target: object) -> object:
    """The same of what a node calls."""
    return getattr(target, "overloadpacket", target)


def is_recomputable(node: fx.Node) -> bool:
    """Whether torch allows this op to run again in the backward (cheap and deterministic)."""
    return bool(_ops.is_recomputable(node)) and not _ops.is_compute_intensive(node)


@by_op
def is_fusible(target: Any) -> bool:
    """Whether Inductor can fuse this op with pointwise neighbours."""
    return packet_of(target) in _FUSIBLE


@by_op
def is_pointwise(target: Any) -> bool:
    """Whether Inductor computes the value element by element, wherever it is read."""
    return packet_of(target) in _POINTWISE


def prefers_channels_last(graph: fx.Graph, kind: str | None = None) -> bool:
    """Whether Inductor will run a training graph's convolutions with the channels last in memory.

    Args:
        kind: type of device that every value counts as being on; None: what each is on.
    """
    lowering: Any = importlib.import_module("torch._inductor.graph")  # slow to import
    of_mkldnn: tuple[str, ...] = lowering.SUPPORTED_MKLDNN_DEVICES  # on these, always where MKL-DNN is
    if kind is not None:
        of_mkldnn = ("cpu", "cuda") if kind in of_mkldnn else ()
    with mock.patch.object(lowering, "SUPPORTED_MKLDNN_DEVICES", of_mkldnn):
        module: Any = SimpleNamespace(graph=graph)
        return bool(lowering.GraphLowering.decide_layout_opt(module, is_inference=False))


def with_channels_last(graph: fx.Graph) -> Collection[fx.Node]:
    """The values that such a graph's convolutions make Inductor lay out so."""
    lowering: Any = importlib.import_module("torch._inductor.graph")
    module: Any = SimpleNamespace(module=SimpleNamespace(graph=graph))
    found: Collection[fx.Node] = lowering.GraphLowering.find_nodes_prefer_channels_last(module)
    return found


def is_random(node: fx.Node) -> bool:
    """Whether running the op twice gives different values."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags or bool(_ops.is_random(node))
    )


def is_collective(node: fx.Node) -> bool:
    """Whether the op talks to other ranks; such an op is never run twice."""
    return getattr(node.target, "namespace", "") in ("_c10d_functional", "c10d_functional")


def is_symbolic(node: fx.Node) -> bool:
    """Whether the node's value is a symbolic number, not a tensor."""
    return bool(is_sym_node(node))


def hint(value: int | torch.SymInt | sympy.Expr, fallback: int = 4096) -> int:
    """A concrete size for planning: the example's own value.

    Of each symbol that depends on data it takes ``fallback``, or the nearest that it may be, as Inductor does
    (sizevars.py, ``optimization_hint``).
    """
    if isinstance(value, int):
        return value
    if isinstance(value, torch.SymInt):
        node = value.node
        return int(node.hint) if node.has_hint() else _likely(node.expr, node.shape_env, fallback)
    return int(value) if value.is_number else fallback


def _likely(expression: sympy.Expr, env: ShapeEnv, fallback: int) -> int:
    values = _examples(env)
    for symbol in expression.free_symbols - values.keys():
        bounds = env.bound_sympy(symbol)
        values[symbol] = max(bounds.lower, min(bounds.upper, sympy.Integer(fallback)))
    return int(expression.xreplace(values))


def _examples(env: ShapeEnv) -> dict[sympy.Symbol, sympy.Integer]:
    """The sizes that dynamic ones have in the example."""
    return dict(env.backed_var_to_val)


def number(value: Any, fallback: float = 1.0) -> float:
    """A symbolic number at the example's sizes, fractions included; ``fallback`` for unbacked symbols."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return float(value.node.hint) if value.node.has_hint() else fallback
    return float(value)


def to_sympy(value: int | torch.SymInt) -> sympy.Expr:
    """The sympy expression behind a size."""
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def exact(value: int | torch.SymInt | sympy.Expr) -> Any:
    """A size that ``==`` compares without a guard: an int, or a dynamic one's sympy expression."""
    if isinstance(value, int):
        return value
    expression = value.node.expr if isinstance(value, torch.SymInt) else value
    return int(expression) if expression.is_number else expression


def comparable(value: int | torch.SymInt) -> Any:
    """A size that comparisons can decide: itself, or :func:`hint`'s fallback where it depends on data."""
    return value if isinstance(value, int) or value.node.has_hint() else hint(value)


def depends_on_data(expression: sympy.Expr) -> bool:
    """Whether an expression has sizes that are only known while the graph runs."""
    return bool(symbolic_shapes.free_unbacked_symbols(expression))


def shape_env(values: Iterable[object]) -> ShapeEnv | None:
    """What torch knows about the dynamic sizes among these values; None where all are fixed."""
    return next((v.node.shape_env for v in values if isinstance(v, torch.SymInt)), None)


def described(env: ShapeEnv, symbol: sympy.Symbol) -> tuple[str, int | None, int, int | None]:
    """Where a size comes from, its value in the example (None: it depends on data), least and most."""
    source = next(iter(env.var_to_sources.get(symbol, ())), None)
    name = "" if source is None else source.name if isinstance(source.name, str) else source.name()
    known = _examples(env)
    bounds = env.bound_sympy(symbol)
    most = int(bounds.upper) if bounds.upper.is_Integer and bounds.upper < MOST_SIZE else None
    least = int(bounds.lower) if bounds.lower.is_Integer else 0
    return name, int(known[symbol]) if symbol in known else None, max(0, least), most


def is_nonnegative(env: ShapeEnv, expression: sympy.Expr) -> bool:
    """Whether an expression of sizes is known never to be negative."""
    return bool(expression.is_nonnegative) or bool(env.bound_sympy(expression).lower >= 0)


def guards(env: ShapeEnv, symbols: set[sympy.Symbol]) -> list[str]:
    """Relations between these sizes that torch compiles again without, ranges left out."""
    found = (env.simplify(guard.expr) for guard in env.guards)
    return list(dict.fromkeys(str(g) for g in found if g.free_symbols and g.free_symbols <= symbols))


def without_guards(env: ShapeEnv) -> AbstractContextManager[None]:
    """Comparisons of dynamic sizes are decided at the example's, and leave no guard."""
    return env.suppress_guards()


def free_symbols(value: Any) -> set[sympy.Symbol]:
    """Symbols that appear in a size or a fake tensor."""
    return set(symbolic_shapes.free_symbols(value))


def renumber_saved_descs(output: fx.Node, num_fwd_outputs: int) -> None:
    """Make an output node's descriptors match its arguments again after saved values changed.

    AOTAutograd keeps one descriptor an output; every saved value gets the descriptor of its
    new position, keeping the version-counter kind.
    """
    (values,) = output.args
    assert isinstance(values, tuple)
    descs = list(output.meta.get("desc", []))[:num_fwd_outputs]
    for index, node in enumerate(values[num_fwd_outputs:]):
        unchecked = isinstance(node, fx.Node) and node.meta.get("saved_tensor_with_no_vc_check", False)
        kind = SavedForBackwardsNoVcCheckAOTOutput if unchecked else SavedForBackwardsAOTOutput
        descs.append(kind(index))
    output.meta["desc"] = descs
    if "output_stack_traces" in output.meta:
        output.meta["output_stack_traces"] = [
            n.meta.get("stack_trace") if isinstance(n, fx.Node) else None for n in values
        ]


def is_getitem(node: fx.Node) -> bool:
    """Whether the node picks one output of a multi-output op."""
    return node.target is operator.getitem


def _rounding(function: Callable[..., int]) -> Callable[[Any, torch.dtype], Any]:
    def call_of(x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, fx.Proxy):
            return function(x)
        return fx.Proxy(x.node.graph.call_function(function, (x.node,)))

    return call_of


class _OnNodes(PythonReferenceAnalysis):
    """Sizes computed by a graph's nodes; Python's own roundings would ask one for a number at once."""

    trunc_to_int = staticmethod(_rounding(math.trunc))
    floor_to_int = staticmethod(_rounding(math.floor))
    ceil_to_int = staticmethod(_rounding(math.ceil))
    round_to_int = staticmethod(_rounding(round))


def size_node(graph: fx.Graph, size: int | torch.SymInt) -> int | fx.Node:
    """A node of ``graph`` that computes ``size`` from the graph's symbol inputs (ints stay ints).

    Inserts at the graph's current insertion point. Raises ``LookupError`` when a symbol is not an input.
    """
    if isinstance(size, int):
        return size
    expression = to_sympy(size)
    if expression.is_number:
        return int(expression)
    inputs: dict[sympy.Symbol, fx.Proxy] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            inputs[value.node.expr] = fx.Proxy(node)
    missing = expression.free_symbols - set(inputs)
    if missing:
        raise LookupError(f"size {expression} needs {missing}, which the graph does not receive")
    if expression in inputs:
        return inputs[expression].node
    before = set(graph.nodes)
    proxy = sympy_interp(_OnNodes, inputs, expression)
    for node in graph.nodes:
        if node not in before:
            node.meta["val"] = node.target(
                *(a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args)
            )
    return proxy.node  # type: ignore[no-any-return]


def forget_compiled(function: Callable[..., object], backend: Callable[..., object]) -> None:
    """Drop what Dynamo has compiled of this function with this backend, which it otherwise holds for good."""
    from torch._dynamo.eval_frame import cached_backends, remove_from_cache

    remove_from_cache(function)
    for key, held in list(cached_backends.items()):
        if getattr(held, "compiler_fn", held) is backend:  # as torch.compile wraps it
            del cached_backends[key]


def user_facing(error: Exception) -> Exception:
    """The same typed error in a form that Dynamo hands to the user as it is.

    Dynamo wraps a backend's exceptions in ``BackendCompilerFailed`` unless they are ``ShortenTraceback``.
    """
    kind = type(error)
    both = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
    raised: Exception = both.__new__(both)  # type: ignore[call-overload]
    raised.args = error.args
    raised.__dict__.update(error.__dict__, first_useful_frame=None, msg=str(error))
    raised.__traceback__ = error.__traceback__
    raised.__cause__ = error.__cause__
    return raised


def check_options_early(backend: object, check: Callable[..., object]) -> None:
    """Call ``check(**kwargs)`` inside ``torch.compile(backend=...)`` itself, before any tracing.

    ``torch.compile`` asks the wrapper around a custom backend for ``get_compiler_config`` when it has
    one; torch's own wrapper for custom backends has none, so giving it one is the earliest point that
    sees a backend's options. Other backends keep the default answer, None.
    """

    def get_compiler_config(wrapper: Any) -> None:
        if wrapper.compiler_fn is backend:
            check(**wrapper.kwargs)

    wrapper = getattr(torch, "_TorchCompileWrapper", None)
    if wrapper is not None:
        wrapper.get_compiler_config = get_compiler_config


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Insert a call at the graph's insertion point and give it the fake value that it computes."""
    node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    fake = next(v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor))
    with fake.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = target(*values)
    node.meta["autograd_backward"] = True
    return node


def call_like(
    graph: fx.Graph, origin: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node:
    """Insert a call with the fake value that it computes; line, module and phase are those of ``origin``."""
    node = graph.call_function(target, args, kwargs)
    kept = ("stack_trace", "nn_module_stack", "seq_nr", "partitioner_tag", "autograd_backward")
    node.meta.update({k: v for k, v in origin.meta.items() if k in kept})
    values, named = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with origin.meta["val"].fake_mode:
        node.meta["val"] = target(*values, **named)
    return node
