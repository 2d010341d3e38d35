"""Writes row-wise regions of a joint graph chunk by chunk: the hands of the passes ``Chunk...``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from ciuic_compile import compat, ops
from ciuic_compile.capture import CapturedGraph
from ciuic_compile.compat import packet
from ciuic_compile.rows import (
    REDUCTIONS,
    VIEWS,
    Label,
    RowRegion,
    is_wide,
    row_shape,
    shape_of,
    slice_of,
)

aten, prims = torch.ops.aten, torch.ops.prims


def write_chunks(captured: CapturedGraph, regions: Sequence[tuple[RowRegion, int]]) -> fx.Graph:
    """A copy of the joint graph with each region, found in the original, in so many chunks."""
    graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in captured.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    late = {copied[n] for n in captured.order if n.op != "output" and captured.is_backward(n)}
    for region, chunks in regions:
        ChunkWriter(graph, region.renamed(copied), late).write(chunks)
    compat.sort(graph)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


@dataclass
class ChunkWriter:
    """Writes the chunks. In a chunk wide values are [rows, classes] and narrow ones [rows, 1]."""

    graph: fx.Graph
    region: RowRegion
    late: set[fx.Node]  # what depends on the gradients
    whole: dict[fx.Node, fx.Node] = field(default_factory=dict)  # region node -> its replacement outside
    made: set[fx.Node] = field(default_factory=set)
    _backward: bool = False  # which of the two is being written
    _done: list[fx.Node] = field(default_factory=list)  # what must be there before the next chunk begins
    _flat: dict[tuple[fx.Node, Label, tuple[int, ...]], fx.Node] = field(default_factory=dict)

    def write(self, chunks: int) -> None:
        """Write the region in so many chunks in place of what is there, which may be dead code then."""
        region = self.region
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        size = -(-region.rows // chunks)
        bounds = [(r, min(r + size, region.rows)) for r in range(0, region.rows, size)]
        members = [*region.labels, *region.ends]
        phases = [n for n in members if n not in self.late], [n for n in members if n in self.late]
        # Behind the matmuls that leave the region, if any: parts of derivatives that wait for no gradient
        # stand among the backward's nodes, and would take the forward's chunks there.
        leaving = [[n for n in nodes if n in region.ends] or nodes for nodes in phases]
        stops = [
            max({*nodes, *(i for n in nodes for i in n.all_input_nodes)}, key=order.__getitem__).next
            for nodes in leaving
        ]
        forward, backward = (
            [n for n in nodes if n in region.labels and not is_wide(region.labels[n])] for nodes in phases
        )
        with self.graph.inserting_before(stops[0]):
            self.values(forward, bounds)
        self._backward = True
        with self.graph.inserting_before(stops[1]):
            self.gradients(backward, bounds)
        for node, whole in self.whole.items():
            node.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in self.made)

    def values(self, nodes: list[fx.Node], bounds: list[tuple[int, int]]) -> None:
        """What leaves the region in the forward, put together from the chunks: statistics and losses (one
        number a row), products with the next weight."""
        wanted = [n for n in nodes if any(self._crosses(n, u) for u in n.users)]
        ends = [n for n in self.region.ends if n not in self.late]
        parts: dict[fx.Node, list[fx.Node]] = {n: [] for n in (*wanted, *ends)}
        for start, stop in bounds:
            chunk: dict[fx.Node, fx.Node] = {}
            for node in wanted:
                parts[node].append(self._value(node, start, stop, chunk, again=False))
            for node in ends:
                parts[node].append(self._end(node, start, stop, chunk, again=False))
            self._done = [pieces[-1] for pieces in parts.values()]
        for node, pieces in parts.items():
            joined = self._call(node, aten.cat.default, (pieces,))
            self.whole[node] = self._call(node, aten.view.default, (joined, list(shape_of(node))))

    def gradients(self, nodes: list[fx.Node], bounds: list[tuple[int, int]]) -> None:
        """The backward, each chunk to its end before the next one begins."""
        outside = [n for n in nodes if any(u not in self.region.labels for u in n.users)]
        parts: dict[fx.Node, list[fx.Node]] = {n: [] for n in outside}
        sums: dict[fx.Node, fx.Node] = {}
        ends = [n for n in self.region.ends if n in self.late]
        inside = [*(n for n in self.region.labels if n in self.late), *ends]
        outer = dict.fromkeys(i for n in inside for i in n.all_input_nodes if i in self.late)
        self._done = [i for i in outer if i not in inside]  # the gradient that comes in
        for start, stop in bounds:
            chunk: dict[fx.Node, fx.Node] = {}
            for end in ends:
                part = self._end(end, start, stop, chunk, again=True)
                if self.region.ends[end] == "rows":
                    parts.setdefault(end, []).append(part)
                else:
                    sums[end] = self._call(end, aten.add.Tensor, (sums[end], part)) if end in sums else part
            for node in outside:
                parts[node].append(self._value(node, start, stop, chunk, again=True))
            self._done = [*sums.values(), *(pieces[-1] for pieces in parts.values())]
        for node, pieces in parts.items():
            joined = self._call(node, aten.cat.default, (pieces,))
            full = self._unshifted(node, joined) if node in self.region.ends else joined
            self.whole[node] = self._call(node, aten.view.default, (full, list(shape_of(node))))
        for node, total in sums.items():
            shaped = self._call(node, aten.view.default, (total, list(shape_of(node))))
            self.whole[node] = self._cast(node, shaped, node.meta["val"].dtype)

    def _crosses(self, node: fx.Node, user: fx.Node) -> bool:
        """Whether a forward value is read outside, in the backward, or by what the backward makes again."""
        label = self.region.labels.get(user)
        return label is None or is_wide(label) or user in self.late

    # ------------------------------------------------------------ one chunk

    def _value(
        self, node: fx.Node, start: int, stop: int, chunk: dict[fx.Node, fx.Node], again: bool
    ) -> fx.Node:
        """A region node's rows; ``again``: in the backward, which reads narrow forward values."""
        if node in chunk:
            return chunk[node]
        label = self.region.labels[node]
        if again and not is_wide(label) and node not in self.late:
            chunk[node] = self._rows(node, self.whole[node], label, start, stop)
            return chunk[node]

        def of(operand: fx.Node) -> fx.Node:
            if operand in self.region.labels:
                return self._value(operand, start, stop, chunk, again)
            return self._outside(node, operand, label, start, stop)

        if node in self.region.sources:
            chunk[node] = self._source(node, start, stop, chunk)
        else:
            chunk[node] = self._compute(node, label, of, stop - start, start)
        return chunk[node]

    def _compute(
        self, node: fx.Node, label: Label, of: Callable[[fx.Node], fx.Node], rows: int, start: int
    ) -> fx.Node:
        op, source = packet(node), node.args[0]
        if op is aten.full:
            shape = [rows, shape_of(node)[label.index("v")]]
            return self._call(node, node.target, (shape, *node.args[1:]), dict(node.kwargs))
        if op is aten.gather:
            index = node.args[2]
            assert isinstance(source, fx.Node) and isinstance(index, fx.Node)
            picked = self._outside(node, index, self.region.labels[source], start, start + rows)
            if index in self.region.labels:
                picked = of(index)
            return self._call(node, aten.gather.default, (of(source), 1, picked))
        if op in VIEWS or op in (aten.slice, aten.slice_scatter) or op is aten.clone:
            if op is aten.slice_scatter:
                source = node.args[1]
            assert isinstance(source, fx.Node)
            value = of(source)
            if is_wide(label) and not is_wide(self.region.labels.get(source, "")):
                size = shape_of(node)[label.index("v")]
                return self._call(node, aten.expand.default, (value, [rows, size]))
            return value
        if op in REDUCTIONS:
            assert isinstance(source, fx.Node)
            dims: Any = 1 if op is aten.argmax else [1]
            return self._call(node, node.target, (of(source), dims, True), dict(node.kwargs))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), of)
        return self._call(node, node.target, args, kwargs)

    def _source(self, node: fx.Node, start: int, stop: int, chunk: dict[fx.Node, fx.Node]) -> fx.Node:
        *bias, x, weight = node.args
        assert isinstance(x, fx.Node)
        if x not in chunk:
            chunk[x] = self._hidden(x, start, stop)
            if (
                self._done
            ):  # one chunk after the other; and in the backward, none before the gradient is there
                chunk[x] = self._call(node, ops.AFTER, (chunk[x], self._done))
        made = self._call(node, node.target, (*bias, chunk[x], weight), dict(node.kwargs))
        if node not in self.late:
            made.meta[self.region.mark] = True
        return made

    def _end(
        self, node: fx.Node, start: int, stop: int, chunk: dict[fx.Node, fx.Node], again: bool
    ) -> fx.Node:
        kind = self.region.ends[node]
        inner = next(i for i in node.all_input_nodes if i in self.region.labels)
        value = self._value(inner, start, stop, chunk, again)
        dtype = node.meta["val"].dtype
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        if kind == "total":
            return self._call(node, aten.sum.dim_IntList, (value, [0], True), {"dtype": wide})
        *bias, left, right = node.args
        if kind == "rows":
            return self._call(node, node.target, (*bias, value, right))
        if inner is left:
            turned = self._call(node, aten.permute.default, (value, [1, 0]))
            assert isinstance(right, fx.Node)
            part = self._call(node, node.target, (turned, self._hidden(right, start, stop)))
        else:
            assert isinstance(left, fx.Node)
            turned = self._call(node, aten.permute.default, (left, [1, 0]))
            turned = self._call(node, aten.permute.default, (self._hidden(turned, start, stop), [1, 0]))
            part = self._call(node, node.target, (turned, value))
        return self._cast(node, part, wide)

    # ------------------------------------------------------------ rows of what is made outside

    def _hidden(self, x: fx.Node, start: int, stop: int) -> fx.Node:
        """Rows of a matrix [all rows, n]: those that the shift leaves, in order."""
        shift = self.region.shift
        if shift is not None:
            x = self._shifted(x, shift)
        return self._slice(x, start, stop)

    def _shifted(self, x: fx.Node, shift: fx.Node) -> fx.Node:
        key = (x, "shifted", ())
        if key not in self._flat:
            before, width, (dim, first, last) = self._shift_geometry(x)
            split = self._call(x, aten.view.default, (x, [*before, width]))
            part = self._call(x, aten.slice.Tensor, (split, dim, first, last))
            part = self._contiguous(part)
            self._flat[key] = self._call(x, aten.view.default, (part, [self.region.rows, width]))
        return self._flat[key]

    def _shift_geometry(self, x: fx.Node) -> tuple[tuple[int, ...], int, tuple[int, int, int]]:
        shift = self.region.shift
        assert shift is not None
        source = shift.all_input_nodes[0]
        label = self.region.labels[source]
        dim, first, last = slice_of(shift, 1)
        return row_shape(shape_of(source), label), shape_of(x)[1], (label[:dim].count("r"), first, last)

    def _unshifted(self, node: fx.Node, joined: fx.Node) -> fx.Node:
        """Gradients of all rows: zero where the loss left them out."""
        if self.region.shift is None:
            return joined
        before, width, (dim, first, last) = self._shift_geometry(node)
        after = [*before, width]
        after[dim] = last - first
        value = node.meta["val"]
        kwargs = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        with value.fake_mode:
            zeros = self._call(node, aten.full.default, ([*before, width], 0), kwargs)
        part = self._call(node, aten.view.default, (joined, after))
        return self._call(node, aten.slice_scatter.default, (zeros, part, dim, first, last))

    def _outside(self, node: fx.Node, operand: fx.Node, label: Label, start: int, stop: int) -> fx.Node:
        """Rows of an operand made outside, aligned with a value of this label."""
        shape = shape_of(operand)
        if not shape:
            return operand
        tail = label[len(label) - len(shape) :]
        letters = {c for c, s in zip(tail, shape, strict=True) if s != 1}
        if "r" not in letters:
            return self._view(operand, (1, prod(shape)))
        full = shape_of(node if packet(node) is not aten.gather else node.args[0])  # type: ignore[arg-type]
        target = tuple(s if c == "r" else 1 for c, s in zip(label, full, strict=True))
        return self._rows(node, operand, label, start, stop, target)

    def _rows(
        self, node: fx.Node, value: fx.Node, label: Label, start: int, stop: int, target: tuple[int, ...] = ()
    ) -> fx.Node:
        key = (value, label, target)
        if key not in self._flat:
            flat = value
            if target and shape_of(value) != target[len(target) - len(shape_of(value)) :]:
                flat = self._call(value, aten.expand.default, (flat, list(target)))
                flat = self._contiguous(flat)
            self._flat[key] = self._view(flat, (self.region.rows, 1))
        return self._slice(self._flat[key], start, stop)

    def _view(self, value: fx.Node, shape: tuple[int, int]) -> fx.Node:
        if shape_of(value) == shape:
            return value
        if not value.meta["val"].is_contiguous():
            value = self._contiguous(value)
        return self._call(value, aten.view.default, (value, list(shape)))

    def _contiguous(self, value: fx.Node) -> fx.Node:
        return self._call(value, aten.clone.default, (value,), {"memory_format": torch.contiguous_format})

    def _slice(self, value: fx.Node, start: int, stop: int) -> fx.Node:
        return self._call(value, aten.slice.Tensor, (value, 0, start, stop))

    def _cast(self, node: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        if value.meta["val"].dtype == dtype:
            return value
        return self._call(node, prims.convert_element_type.default, (value, dtype))

    def _call(
        self, origin: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> fx.Node:
        """Insert a call that belongs to the line and module of ``origin``."""
        node = compat.call_like(self.graph, origin, target, args, kwargs or {})
        self.made.add(node)
        if self._backward:
            self.late.add(node)
        return node
