"""Forward and backward graphs of a joint graph, to look at: what torch's partitioner would extract, faster.

Every answer of the planner is judged on such graphs. torch (torch/_functorch/partitioners.py,
``_extract_fwd_bwd_modules`` and ``reordering_to_mimic_autograd_engine``, 2.11 to 2.13) copies the joint
graph four times for them. Where nothing in it has effects or symbolic sizes, one copy of what is needed is
the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch._functorch.partitioners
import torch._inductor.config as inductor_config
from torch import fx
from torch._functorch.partitioners import NodeInfo
from torch.fx.experimental.proxy_tensor import is_sym_node

from .compat import without_code

_partitioners: Any = torch._functorch.partitioners  # what it has, and where from, differs between versions


class Extractor:
    """Extracts from one joint graph, which stays as it is.

    Args:
        joint: a graph that torch's partitioner has classified.
        info: what it found.
    """

    def __init__(self, joint: fx.GraphModule, info: NodeInfo, num_fwd_outputs: int) -> None:
        self._joint, self._info, self._num_fwd_outputs = joint, info, num_fwd_outputs
        self._simple = is_simple(joint.graph)

    def __call__(self, saved: Sequence[fx.Node]) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward graphs for a set of saved values, in torch's backward order (no RNG).

        They have no code, so they are only good for looking at.
        """
        joint = self._joint
        graphs = _extract_simple(joint.graph, saved, self._num_fwd_outputs) if self._simple else None
        if graphs is None:
            return extract_as_torch(joint, saved, self._info, self._num_fwd_outputs)
        with without_code():
            return fx.GraphModule(joint, graphs[0]), fx.GraphModule(joint, graphs[1])


def extract_as_torch(
    joint: fx.GraphModule, saved: Sequence[fx.Node], info: NodeInfo, num_fwd_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The same by torch's own functions, for every graph."""
    opaque = getattr(_partitioners, "is_opaque_node", lambda node: False)
    extra: dict[str, Any] = {}
    if hasattr(_partitioners, "is_opaque_node"):  # 2.13
        extra["saved_opaque_nodes"] = [n for n in saved if opaque(n)]
    with without_code():
        forward, backward = _partitioners._extract_fwd_bwd_modules(
            joint,
            [n for n in saved if not is_sym_node(n) and not opaque(n)],
            saved_sym_nodes=[n for n in saved if is_sym_node(n)],
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_nodes=info.static_lifetime_input_nodes,
            **extra,
        )
        return forward, _partitioners.reordering_to_mimic_autograd_engine(backward)


def is_simple(joint: fx.Graph) -> bool:
    """Whether a joint graph has inputs, tangents and functions of them alone, on sizes that are numbers."""
    random = bool(inductor_config.fallback_random)
    for node in joint.nodes:
        if node.op == "placeholder":
            if not (_partitioners._is_primal(node) or _partitioners._is_tangent(node)):
                return False
        elif node.op == "call_function":
            placed = str(node.meta.get("partitioner_tag", "")).startswith("must_be_in")
            if placed or is_sym_node(node) or node.is_impure(random):
                return False
        elif node.op != "output":
            return False
        if isinstance(node.meta.get("val"), torch.SymInt):
            return False
    return True


def _extract_simple(
    joint: fx.Graph, saved: Sequence[fx.Node], num_fwd_outputs: int
) -> tuple[fx.Graph, fx.Graph] | None:
    """None where these values do not suffice, or one of them is no tensor: torch says what is wrong."""
    end = joint.output_node()
    results = torch.utils._pytree.arg_tree_leaves(*end.args)
    descs = torch.utils._pytree.arg_tree_leaves(end.meta.get("desc", [None] * len(results)))
    placeholders = joint.find_nodes(op="placeholder")
    primals = [n for n in placeholders if _partitioners._is_primal(n)]
    tangents = [n for n in placeholders if _partitioners._is_tangent(n)]
    before, after = results[:num_fwd_outputs], results[num_fwd_outputs:]
    if not all(isinstance(n.meta.get("val"), torch.Tensor) for n in saved):
        return None
    needed, read = _needed(after, {*saved, *tangents})
    kept = [n for n in saved if n in read]
    kept.sort(key=lambda n: bool(n.meta.get("saved_tensor_with_no_vc_check", False)))
    computed, _ = _needed([*before, *kept], set(primals))
    if any(n.op == "placeholder" for n in needed | computed):
        return None
    order = [n for n in joint.nodes if n in needed]
    forward = _copied((n for n in joint.nodes if n in computed), primals, [*before, *kept])
    forward.output_node().meta["desc"] = [*descs[:num_fwd_outputs], *[None] * len(kept)]
    backward = _copied(_as_autograd(order, {*kept, *tangents}, tangents), [*kept, *tangents], after)
    backward.output_node().meta["desc"] = descs[num_fwd_outputs:]
    return forward, backward


def _needed(results: Iterable[object], given: set[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """What results are computed from, up to what is given, and what of that is read."""
    needed: set[fx.Node] = set()
    stack = [n for n in results if isinstance(n, fx.Node)]
    read = given.intersection(stack)
    while stack:
        node = stack.pop()
        if node in given:
            read.add(node)
        elif node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed, read


def _as_autograd(
    order: Sequence[fx.Node], inputs: set[fx.Node], tangents: Sequence[fx.Node]
) -> list[fx.Node]:
    """What needs a tangent in its order, and what is made again of saved values right before its reader."""
    place = {node: index for index, node in enumerate(order)}
    starts = [place[u] for tangent in tangents for u in tangent.users if u in place]
    if not starts:
        return list(order)
    found: dict[fx.Node, None] = {}
    for node in order[min(starts) :]:
        new: set[fx.Node] = set()
        stack = [node]
        while stack:
            each = stack.pop()
            if each not in new and each not in found and each not in inputs:
                new.add(each)
                stack.extend(each.all_input_nodes)
        found.update(dict.fromkeys(sorted(new, key=place.__getitem__)))
    for node in order:  # for the output alone
        found.setdefault(node)
    return list(found)


def _copied(nodes: Iterable[fx.Node], inputs: Sequence[fx.Node], results: Sequence[Any]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] if isinstance(n, fx.Node) else n for n in results))
    return graph
