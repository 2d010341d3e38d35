"""Which part of a joint graph works row by row (token by token) between the logits and the loss.

What :class:`RowFinder` accepts can be computed for a few rows at a time: every value in it belongs to one
row, or is a sum over rows that can be accumulated. Whatever it does not understand raises :class:`Declined`.
``feed_forward.py`` finds other such parts, between two matmuls, in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch
from torch import fx

from .capture import CapturedGraph
from .compat import packet

aten, prims = torch.ops.aten, torch.ops.prims
#: One letter a dimension: "r" rows, "v" classes, "1" of size one. Row dimensions stay in row-major order.
Label = str
VIEWS = {
    aten.view, aten.reshape, aten._unsafe_view, aten.permute, aten.unsqueeze, aten.squeeze, aten.alias,
    aten.expand, aten.transpose, aten.t,
}  # fmt: skip
COPIES = {aten.clone, prims.convert_element_type}
REDUCTIONS = {aten.amax, aten.amin, aten.sum, aten.argmax}  # over the classes, dimensions as second argument
_PERMUTATIONS = {aten.permute, aten.transpose, aten.t}
_CONSTANTS = {aten.full}
#: Marks (``node.meta``) of the matmuls that make a chunk's values, in the forward and again in the backward.
LOSS_CHUNK = "ciuic_loss_chunk"
FEED_FORWARD_CHUNK = "ciuic_feed_forward_chunk"


class Declined(Exception):
    """Why the loss (or feed-forward) stays in one piece, as the end of a sentence."""


@dataclass(frozen=True)
class RowRegion:
    """What is computed chunk by chunk.

    Attributes:
        sources: the matmuls that make [tokens, classes]: the logits; or what a feed-forward's activation
            reads, and its gradient.
        labels: the region's nodes and what their dimensions mean, in graph order; narrow ones have no "v".
        ends: nodes that leave the region: "rows" (matmul over the classes: gradient of the hidden states),
            "weight" (matmul over the rows: gradient of a weight), "total" (sum over rows: that of a bias).
        shift: the slice that drops some rows, as ``logits[:, :-1]`` does; rows are counted after it.
        rows: how many rows there are.
        made_again: how many of the sources are values of the forward, which the backward makes again.
        mark: what the sources' chunks are marked with, where they are values of the forward.
    """

    sources: tuple[fx.Node, ...]
    labels: dict[fx.Node, Label]
    ends: dict[fx.Node, str]
    shift: fx.Node | None
    rows: int
    made_again: int = 1
    mark: str = LOSS_CHUNK

    def renamed(self, names: dict[fx.Node, fx.Node]) -> RowRegion:
        """The same region in a copy of the graph."""
        return RowRegion(
            tuple(names[n] for n in self.sources),
            {names[n]: label for n, label in self.labels.items()},
            {names[n]: kind for n, kind in self.ends.items()},
            names[self.shift] if self.shift is not None else None,
            self.rows,
            self.made_again,
            self.mark,
        )


def is_wide(label: Label) -> bool:
    """Whether the value has an element for every row and class."""
    return "r" in label and "v" in label


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The node's sizes, all of them plain numbers; raises :class:`Declined` otherwise."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Declined(f"{node.name} is not a tensor")
    if not all(isinstance(s, int) for s in value.shape):
        raise Declined("its sizes are dynamic")
    return tuple(int(s) for s in value.shape)


def dims_of(node: fx.Node) -> list[int]:
    """The dimensions that a reduction reduces, from 0; empty when it reduces all of them."""
    dims = node.args[1] if len(node.args) > 1 else []
    listed = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    count = len(shape_of(node.all_input_nodes[0]))
    return [d % count for d in listed if isinstance(d, int)]


def slice_of(node: fx.Node, first: int) -> tuple[int, int, int]:
    """(dimension, start, end) of a ``slice`` or ``slice_scatter``, whose dimension is argument ``first``."""
    given = list(node.args[first:])
    dim, start, end, step = given + [0, None, None, 1][len(given) :]
    shape = shape_of(node.all_input_nodes[0])
    if step != 1 or not isinstance(dim, int):
        raise Declined(f"{node.name} takes every {step}th row")
    size = shape[dim % len(shape)]
    begin, stop, _ = slice(start, end).indices(size)
    return dim % len(shape), begin, stop


class RowFinder:
    """Follows the logits of one joint graph to the loss and back."""

    what = "logits"  # in sentences on why not
    mark = LOSS_CHUNK

    def __init__(self, captured: CapturedGraph, logits: fx.Node) -> None:
        self._captured = captured
        self._logits = logits
        self._sources = [logits]
        self._labels: dict[fx.Node, Label] = {logits: "rv"}
        self._from_logits = {logits}  # the others were pulled in: masks and constants of full size
        self._ends: dict[fx.Node, str] = {}
        self._before_shift = {logits}  # views and casts of all rows, before the shift and after its gradient
        self._shift: fx.Node | None = None

    def find(self) -> RowRegion:
        """The region of these logits. Raises :class:`Declined` where something is not row by row."""
        before = -1
        while before < len(self._labels):  # what is pulled in may have readers that were passed by already
            before = len(self._labels)
            for node in self._captured.graph.nodes:
                if node not in self._labels and node not in self._ends:
                    self._visit(node)
        if "rows" not in self._ends.values() and "weight" not in self._ends.values():
            raise Declined("no gradient is computed from it")
        order = self._captured.order
        kept = {n: self._labels[n] for n in sorted(self._needed(), key=order.__getitem__)}
        sources = tuple(n for n in kept if n in self._sources)
        again = sum(not self._captured.is_backward(n) for n in sources)
        region = RowRegion(sources, kept, self._ends, self._shift, self._rows(), again, self.mark)
        self._check(region)
        return region

    # ------------------------------------------------------------ labels

    def _visit(self, node: fx.Node) -> None:
        known = [i for i in node.all_input_nodes if i in self._labels]
        if not known:
            return
        if node.op == "output":
            if any(is_wide(self._labels[i]) and i in self._from_logits for i in known):
                raise Declined(f"the {self.what} are also returned")
            return
        try:
            label = self._label(node)
        except Declined:
            if any(is_wide(self._labels[i]) and i in self._from_logits for i in known):
                raise
            return  # stays outside, and reads the whole
        if label is not None:
            self._labels[node] = label
            if any(i in self._from_logits for i in known):
                self._from_logits.add(node)
            if any(i in self._before_shift for i in known) and node is not self._shift:
                if packet(node) in VIEWS | COPIES:
                    self._before_shift.add(node)

    def _label(self, node: fx.Node) -> Label | None:
        """The label of a node that reads labelled values; None for an end of the region."""
        op, source = packet(node), node.all_input_nodes[0]
        shape = shape_of(node)
        if op in (aten.mm, aten.addmm):
            self._ends[node] = self._matmul(node)
            return None
        if op in VIEWS:
            return _viewed(node, self._labels[source])
        if op in REDUCTIONS:
            return self._reduced(node, source)
        if op is aten.gather:
            return self._gathered(node)
        if op is aten.slice:
            return self._sliced(node, source)
        if op is aten.slice_scatter:
            return self._scattered(node)
        if op in COPIES:
            return self._labels[source]
        if not is_elementwise(node):
            raise Declined(f"{node.name} ({node.target}) is not understood")
        label = self._broadcast(node, shape)
        self._pull_operands(node, label)
        return label

    def _broadcast(self, node: fx.Node, shape: tuple[int, ...]) -> Label:
        """The label of an elementwise result, from its labelled operands aligned at the last dimension."""
        result = ["1"] * len(shape)
        for operand in node.all_input_nodes:
            for back, letter in enumerate(reversed(self._labels.get(operand, "")), 1):
                if letter != "1":
                    if result[-back] not in ("1", letter):
                        raise Declined(f"{node.name} mixes rows and classes")
                    result[-back] = letter
        for dim, size in enumerate(shape):
            if result[dim] == "1" and size != 1:
                if size != shape_of(self._logits)[1] or "v" in result:
                    raise Declined(f"{node.name} has a dimension that is neither rows nor classes")
                result[dim] = "v"  # rows of one operand against classes of another: class weights
        return "".join(result)

    def _pull_operands(self, node: fx.Node, label: Label) -> None:
        for operand in node.all_input_nodes:
            self._pull(operand, _aligned(operand, label))

    def _pull(self, node: fx.Node, label: Label) -> None:
        """Make an operand of full size part of the region: a mask, a constant, a gradient."""
        if not is_wide(label):
            if node in self._labels and self._labels[node] != label:
                raise Declined(f"{node.name} is read in two orders of its rows")
            return
        if node in self._labels:
            if self._labels[node] != label:
                raise Declined(f"{node.name} is read in two orders of its rows")
            return
        op = packet(node)
        if node.op != "call_function":
            if self._captured.is_backward(node):  # their gradient comes from outside
                raise Declined(f"the {self.what} are also returned")
            raise Declined(f"{node.name} is as large as the {self.what} (class probabilities as targets)")
        if op in _CONSTANTS or self._is_source(node, label):
            pass
        elif op is aten.expand:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            self._pull(source, _aligned(source, label))
        elif op in VIEWS:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            self._pull(source, _before_view(node, label))
        elif op in COPIES or is_elementwise(node):
            self._pull_operands(node, label)
        else:
            raise Declined(
                f"{node.name} ({node.target}) is as large as the {self.what} and is not understood"
            )
        self._labels[node] = label

    def _is_source(self, node: fx.Node, label: Label) -> bool:
        """Whether an operand of full size is made by a matmul that belongs to the region."""
        return False

    def _reduced(self, node: fx.Node, source: fx.Node) -> Label | None:
        label, dims = self._labels[source], dims_of(node)
        if not dims:
            raise Declined(f"{node.name} adds up all of the logits at once")
        keep = shape_of(node) == tuple(1 if d in dims else s for d, s in enumerate(shape_of(source)))
        letters = {label[d] for d in dims} - {"1"}
        if letters == {"v"}:
            kept = [("1" if d in dims else c) if keep else c for d, c in enumerate(label)]
            return "".join(c for d, c in enumerate(kept) if keep or d not in dims)
        rows = {d for d, c in enumerate(label) if c == "r"}
        if packet(node) is aten.sum and is_wide(label) and {d for d in dims if label[d] == "r"} == rows:
            if letters == {"r"} and self._captured.is_backward(node):
                self._ends[node] = "total"
                return None
        raise Declined(f"{node.name} ({node.target}) reduces over the tokens")

    def _gathered(self, node: fx.Node) -> Label:
        source, dim, index = node.args[:3]
        assert isinstance(source, fx.Node) and isinstance(index, fx.Node) and isinstance(dim, int)
        label = self._labels.get(source, "")
        if not label or label[dim] != "v" or shape_of(index)[dim] != 1:
            raise Declined(f"{node.name} picks more than one class a row")
        expected = tuple(1 if c == "v" else s for c, s in zip(label, shape_of(source), strict=True))
        if shape_of(index) != expected:
            raise Declined(f"{node.name} picks from some of the rows")
        return label.replace("v", "1")

    def _sliced(self, node: fx.Node, source: fx.Node) -> Label:
        label = self._labels[source]
        dim, _, _ = slice_of(node, 1)
        if label[dim] == "1" or shape_of(node) == shape_of(source):
            return label
        if label[dim] != "r" or not is_wide(label) or source not in self._before_shift:
            raise Declined(f"{node.name} takes a part of the classes, or rows of the loss")
        if self._shift is not None:
            raise Declined("its logits are sliced twice")
        self._shift = node
        return label

    def _scattered(self, node: fx.Node) -> Label:
        zeros, source = node.args[:2]
        assert isinstance(zeros, fx.Node) and isinstance(source, fx.Node)
        label, shift = self._labels.get(source, ""), self._shift
        fill = packet(zeros) is aten.full and zeros.args[1] == 0
        if shift is None or not fill or not is_wide(label) or not self._captured.is_backward(node):
            raise Declined(f"{node.name} writes into rows")
        (dim, *ends), (forward_dim, *forward_ends) = slice_of(node, 2), slice_of(shift, 1)
        sliced = shift.all_input_nodes[0]
        if ends != forward_ends or label[:dim].count("r") != self._labels[sliced][:forward_dim].count("r"):
            raise Declined(f"{node.name} writes into other rows than were taken")
        if row_shape(shape_of(node), label) != row_shape(shape_of(sliced), self._labels[sliced]):
            raise Declined(f"{node.name} writes into other rows than were taken")
        self._before_shift.add(node)
        return label

    def _matmul(self, node: fx.Node) -> str:
        left, right = node.args[-2:]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        labels = (self._labels.get(left), self._labels.get(right))
        if packet(node) is aten.mm and self._captured.is_backward(node):
            if labels == ("rv", None):
                return "rows"
            if labels in (("vr", None), (None, "rv")):
                return "weight"
        raise Declined(f"{node.name} multiplies the logits again")

    # ------------------------------------------------------------ what stays in it

    def _rows(self) -> int:
        node = self._shift or self._logits
        return prod(row_shape(shape_of(node), self._labels[node]))

    def _needed(self) -> set[fx.Node]:
        """All wide nodes, and the narrow ones between them; other narrow ones work on all rows, outside."""
        needed: set[fx.Node] = set()
        for node in reversed(self._captured.graph.nodes):
            label = self._labels.get(node)
            if label is None:
                continue
            phase = self._captured.is_backward(node)
            inner = any(u in needed and self._captured.is_backward(u) == phase for u in node.users)
            reads_wide = any(is_wide(self._labels.get(i, "")) for i in node.all_input_nodes)
            if is_wide(label) or reads_wide or ("r" in label and inner):
                needed.add(node)
        return needed

    def _check(self, region: RowRegion) -> None:
        if any("r" not in label for label in region.labels.values()):
            raise Declined("some of it does not depend on the rows")
        for node, label in region.labels.items():
            partial = self._shift is not None and node in self._before_shift
            if not partial and prod(row_shape(shape_of(node), label)) != region.rows:
                raise Declined(f"{node.name} reads rows that the loss leaves out")
        for phase in (False, True):
            members = {n for n in (*region.labels, *region.ends) if self._captured.is_backward(n) == phase}
            after = _downstream(members)
            for node in members:
                outside = [i for i in node.all_input_nodes if i not in members and i in after]
                if outside:
                    raise Declined(f"{outside[0].name} needs every row before {node.name} can have one")


def row_shape(shape: tuple[int, ...], label: Label) -> tuple[int, ...]:
    """The sizes of the row dimensions."""
    return tuple(s for s, c in zip(shape, label, strict=True) if c == "r")


def is_elementwise(node: fx.Node) -> bool:
    """Whether the op computes each element from those at the same place of its (broadcast) operands."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or packet(node) in COPIES
    )


def _aligned(operand: fx.Node, label: Label) -> Label:
    """The part of an elementwise result's label that an operand has."""
    shape = shape_of(operand)
    tail = label[len(label) - len(shape) :] if shape else ""
    return "".join("1" if s == 1 else c for s, c in zip(shape, tail, strict=True))


def _viewed(node: fx.Node, label: Label) -> Label:
    """The label after a view: rows and classes must stay apart, rows in their order."""
    op, source = packet(node), node.all_input_nodes[0]
    before, after = shape_of(source), shape_of(node)
    if op in _PERMUTATIONS:
        return "".join(label[d] for d in _checked(node, label, _order(node)))
    if op is aten.expand:
        grown = label.rjust(len(after), "1")
        sizes = (1,) * (len(after) - len(before)) + before
        changed = [d for d in range(len(after)) if sizes[d] != after[d]]
        if not changed:
            return grown
        if len(changed) > 1 or "v" in label:
            raise Declined(f"{node.name} repeats rows")
        return grown[: changed[0]] + "v" + grown[changed[0] + 1 :]
    return _regrouped(node, label, before, after)


def _before_view(node: fx.Node, label: Label) -> Label:
    """The label that a view's source has, from that of the view."""
    source = node.all_input_nodes[0]
    if packet(node) in _PERMUTATIONS:
        order = _order(node)
        return "".join(label[order.index(d)] for d in _checked(node, label, range(len(order))))
    return _regrouped(node, label, shape_of(node), shape_of(source))


def _order(node: fx.Node) -> list[int]:
    """A permutation's order of its source's dimensions."""
    count = len(shape_of(node))
    order = list(range(count))
    if packet(node) is aten.permute:
        return [int(d) % count for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    a, b = (node.args[1], node.args[2]) if packet(node) is aten.transpose else (0, count - 1)
    order[a], order[b] = order[b], order[a]  # type: ignore[index]
    return order


def _checked(node: fx.Node, label: Label, order: Sequence[int]) -> Sequence[int]:
    rows = [d for d in order if label[d] == "r"]
    if rows != sorted(rows):
        raise Declined(f"{node.name} changes the order of the rows")
    return order


def _regrouped(node: fx.Node, label: Label, before: tuple[int, ...], after: tuple[int, ...]) -> Label:
    """The label after dimensions were split or merged."""
    kinds = [(c, s) for c, s in zip(label, before, strict=True) if s != 1]
    parts = [(c, prod(s for _, s in group)) for c, group in groupby(kinds, lambda kind: kind[0])]
    result, index, done = "", 0, 1
    for size in after:
        if size == 1:
            result += "1"
            continue
        if index >= len(parts) or (parts[index][1] // done) % size:
            raise Declined(f"{node.name} mixes rows and classes")
        result, done = result + parts[index][0], done * size
        if done == parts[index][1]:
            index, done = index + 1, 1
    if index != len(parts) or result.count("v") != label.count("v"):
        raise Declined(f"{node.name} mixes rows and classes")
    return result


def _downstream(nodes: set[fx.Node]) -> set[fx.Node]:
    """Everything outside ``nodes`` that is computed from them."""
    found: set[fx.Node] = set()
    stack = [u for n in nodes for u in n.users]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found - nodes
