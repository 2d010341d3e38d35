"""Stage 2: the joint graph, as torch's partitioner classified it, in one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from . import compat, ops
from .codecs.base import Size

aten = torch.ops.aten


@dataclass(frozen=True)
class CapturedGraph:
    """A joint forward-backward graph at the partition point.

    Attributes:
        graph: the functional, decomposed joint graph; never modified after capture.
        info: torch's classification of its nodes.
        baseline_saved: nodes that Inductor's own min-cut would save (parameters included).
        num_fwd_outputs: how many of the graph's outputs belong to the forward.
    """

    graph: fx.Graph
    info: compat.NodeInfo
    baseline_saved: tuple[fx.Node, ...]
    num_fwd_outputs: int

    @cached_property
    def order(self) -> dict[fx.Node, int]:
        """Position of every node in the joint graph."""
        return {node: index for index, node in enumerate(self.graph.nodes)}

    @cached_property
    def parameters(self) -> frozenset[fx.Node]:
        """Placeholders that live as long as the model: parameters and buffers."""
        return frozenset(self.info.static_lifetime_input_nodes)

    @cached_property
    def mutated(self) -> frozenset[fx.Node]:
        """Placeholders that the forward overwrites (running statistics): the backward sees other values."""
        copies = self.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
        targets = (n.args[0] for n in copies if not self.is_backward(n))
        return frozenset(n for n in targets if isinstance(n, fx.Node) and n.op == "placeholder")

    @cached_property
    def fwd_outputs(self) -> tuple[fx.Node, ...]:
        """Nodes that the compiled forward returns to the user."""
        flat = torch.utils._pytree.arg_tree_leaves(*self.graph.output_node().args)
        return tuple(n for n in flat[: self.num_fwd_outputs] if isinstance(n, fx.Node))

    @cached_property
    def bwd_outputs(self) -> tuple[fx.Node, ...]:
        """Gradient nodes, in the order of the inputs; inputs without a gradient are left out."""
        flat = torch.utils._pytree.arg_tree_leaves(*self.graph.output_node().args)
        return tuple(n for n in flat[self.num_fwd_outputs :] if isinstance(n, fx.Node))

    @cached_property
    def savable(self) -> tuple[fx.Node, ...]:
        """Nodes that need no tangent, in order: the forward can compute each of them."""
        return tuple(n for n in self.graph.nodes if n.op != "output" and not self.is_backward(n))

    @cached_property
    def gradients(self) -> frozenset[fx.Node]:
        """Nodes that a tangent's value reaches. What is made again of forward values only waits for one."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if any(i in found for i in operands(node)) or (
                node.op == "placeholder" and self.is_backward(node)
            ):
                found.add(node)
        return frozenset(found)

    def is_backward(self, node: fx.Node) -> bool:
        """Whether the node depends on a tangent, so that only the backward can compute it."""
        return node in self.info.tangents_closure


#: Backward ops that ask their second operand, the forward's input, for nothing but its shape.
SHAPE_ONLY = {
    aten.max_pool2d_with_indices_backward, aten.max_pool3d_with_indices_backward,
    aten.avg_pool2d_backward, aten.avg_pool3d_backward,
    aten._adaptive_avg_pool2d_backward, aten._adaptive_avg_pool3d_backward,
    aten.adaptive_max_pool2d_backward, aten.adaptive_max_pool3d_backward,
    aten.reflection_pad1d_backward, aten.reflection_pad2d_backward, aten.reflection_pad3d_backward,
    aten.replication_pad1d_backward, aten.replication_pad2d_backward, aten.replication_pad3d_backward,
}  # fmt: skip


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values the node's is computed from: not what it waits for or asks for its shape."""
    if node.target is ops.AFTER:
        return node.all_input_nodes[:1]
    if compat.packet(node) in SHAPE_ONLY:
        return [n for n in node.all_input_nodes if n is not node.args[1]]
    return node.all_input_nodes


def owner(node: fx.Node) -> fx.Node:
    """The node whose storage this node's value aliases (itself when it aliases none).

    Follows views and the getitems of multi-output views such as ``split``.
    """
    while True:
        if compat.is_getitem(node):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if not compat.is_view(source):
                return node
            node = source
        elif compat.is_view(node):
            if not node.all_input_nodes:  # a view of a constant
                return node
            node = node.all_input_nodes[0]
        else:
            return node


def tensor(node: fx.Node) -> torch.Tensor | None:
    """The node's fake tensor, or None for numbers, tuples and nodes without a value."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def numel(node: fx.Node) -> int:
    """Elements of the node's value; symbolic sizes at their hints, at least 1."""
    value = tensor(node)
    return 1 if value is None else max(1, compat.hint(value.numel()))


def extent(node: fx.Node) -> Size:
    """Elements of the node's value, at least 1, as :func:`compat.exact` gives them."""
    value = tensor(node)
    return 1 if value is None else compat.exact(value.numel()) or 1
