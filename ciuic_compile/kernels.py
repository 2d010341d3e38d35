"""Which stored values Inductor computes in one kernel, and in which order its kernels run.

After torch._inductor's scheduler: ``get_possible_fusions``, ``score_fusion``, ``are_long_distant_nodes``,
``SIMDScheduling.can_fuse``, ``FusedMixOrderReductions`` and ``topological_sort_schedule``. Left out: tilings,
and loops that are reordered to read alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import fx

from . import compat, compat_fusion
from .capture import tensor
from .classify import is_reduction
from .codecs.base import Size

Reads = Mapping[fx.Node, frozenset[fx.Node]]

#: Values that only read the same run apart if further from each other than so many.
_DISTANCE = 64
#: Of what reads one storage, each is paired with so many that follow.
_PAIRS = 64
#: A reduction of columns takes two steps if it makes one of so many.
_TWO_STEPS = 64
#: Rows and columns are reduced together from so many elements and rows on, and rows for each column; up to so
#: many columns.
_BOTH_ELEMENTS, _BOTH_ROWS, _BOTH_RATIO, _BOTH_COLUMNS = 5 * 2**20, 4096, 2, 2**14


@dataclass(frozen=True)
class Loop:
    """What a value is computed in: over ``total`` elements, of which ``outer`` are made.

    Attributes:
        rows: of a reduction, whether it reduces what lies side by side.
        hints: of a reduction, ``outer`` and ``total`` at the example's sizes.
    """

    outer: Size
    total: Size
    reduces: bool = False
    rows: bool = False
    hints: tuple[int, int] = field(default=(0, 0), compare=False)

    def joined(self, other: Loop) -> Loop | None:
        """The loop in which both run, or None."""
        if self.reduces == other.reduces:
            return self if self == other else None
        reduction, values = (self, other) if self.reduces else (other, self)
        whole = reduction.rows and values.total == reduction.total
        return reduction if whole or values.total == reduction.outer else None

    def crosses(self, other: Loop) -> bool:
        """Whether this reduces the rows and the other the columns of a matrix, and one kernel does both."""
        if not (self.rows and other.reduces and not other.rows and self.total == other.total):
            return False
        (rows, total), (columns, _) = self.hints, other.hints
        large = total >= _BOTH_ELEMENTS and rows >= max(_BOTH_ROWS, _BOTH_RATIO * columns)
        return rows * columns == total and large and columns <= _BOTH_COLUMNS


@dataclass(frozen=True, eq=False)
class _Part:
    """Values that run in one loop, by their places in the graph.

    Attributes:
        read, touched: the storages that they read, and those with what they make.
        bits: the places, as bits of a number.
        above: likewise, those of all that they are computed from.
    """

    values: tuple[int, ...]
    loop: Loop | None
    read: frozenset[fx.Node]
    touched: frozenset[fx.Node]
    bits: int
    above: int

    def with_(self, other: _Part) -> _Part | None:
        """Both in one loop, if there is one and they have something in common."""
        loop = None if self.loop is None or other.loop is None else self.loop.joined(other.loop)
        if loop is None or self.touched.isdisjoint(other.touched):
            return None
        read, touched = self.read | other.read, self.touched | other.touched
        bits, above = self.bits | other.bits, self.above | other.above
        return _Part(self.values + other.values, loop, read, touched, bits, above)

    def independent(self, other: _Part) -> bool:
        """Whether none is computed from the other."""
        return not (self.above & other.bits or other.above & self.bits)


class _Kernel:
    """One part, or one that reduces rows and one that reduces columns; ``needs`` are of what runs before."""

    def __init__(self, parts: tuple[_Part, ...], needs: frozenset[int], position: int) -> None:
        self.parts, self.needs, self.position = parts, needs, position
        self.values = sorted(v for part in parts for v in part.values)
        self.first, self.last = self.values[0], self.values[-1]
        self.touched = frozenset[fx.Node]().union(*(part.touched for part in parts))
        self.bits = sum(part.bits for part in parts)
        self.reduces = any(part.loop is not None and part.loop.reduces for part in parts)

    def crossed_by(self, other: _Kernel, parts: Sequence[_Part]) -> bool:
        """Whether one kernel of both, of these parts, reduces rows and columns that either alone does not."""
        return len(parts) > max(len(self.parts), len(other.parts))


def grouped(stored: Reads, loops: Mapping[fx.Node, Loop | None]) -> list[list[fx.Node]]:
    """The stored values in the order in which Inductor makes them, those of one kernel together.

    Args:
        stored: what each of them reads, in the graph's order.
        loops: what each is computed in; None for what runs by itself.
    """
    grouping = _Grouping(stored, loops)
    while grouping.fuse_round():
        pass
    return grouping.order()


def by_last_value(kernels: Sequence[Sequence[fx.Node]], stored: Reads) -> list[Sequence[fx.Node]]:
    """Kernels in the order of ``compat_order.py``: where the last value stands that each makes or waits for.

    Args:
        kernels: each behind what it needs.
        stored: what their values read, in the graph's order.
    """
    place = {node: i for i, node in enumerate(stored)}
    last: dict[fx.Node, int] = {}
    for kernel in kernels:
        before = {maker_of(storage) for node in kernel for storage in stored[node]}
        latest = max([*(place[n] for n in kernel), *(last[n] for n in before if n in last)])
        last |= dict.fromkeys(kernel, latest)
    return sorted(kernels, key=lambda kernel: last[kernel[0]])


class _Grouping:
    """Kernels in a line, each behind what it needs."""

    def __init__(self, stored: Reads, loops: Mapping[fx.Node, Loop | None]) -> None:
        self._nodes = list(stored)
        place = {node: i for i, node in enumerate(self._nodes)}
        storages = dict.fromkeys(s for node, read in stored.items() for s in (node, *read))
        made: dict[fx.Node, list[fx.Node]] = {}
        for storage in storages:
            made.setdefault(maker_of(storage), []).append(storage)
        self._elements = {s: _elements(s) for s in storages}
        self._bytes = {s: n * _itemsize(s) for s, n in self._elements.items()}
        self._counted = _counted(loops, made)
        self._of: list[_Kernel] = []  # value -> its kernel
        above: list[int] = []
        for i, (node, read) in enumerate(stored.items()):
            needs = frozenset(place[m] for m in map(maker_of, read) if m in place)
            above.append(0)
            for index in needs:
                above[i] |= above[index] | 1 << index
            part = _Part((i,), loops[node], read, read.union(made[node]), 1 << i, above[i])
            self._of.append(_Kernel((part,), needs, i))
        self._above = above
        self._line: list[_Kernel | None] = list(self._of)  # by position; None where one has left

    def fuse_round(self) -> bool:
        """Make one kernel of every two that may be, those that share most first; whether any was."""
        readers: dict[fx.Node, list[_Kernel]] = {}
        for kernel in sorted(filter(None, self._line), key=lambda k: k.first):
            if kernel.parts[0].loop is not None:
                for storage in kernel.touched:
                    readers.setdefault(storage, []).append(kernel)
        scores: dict[tuple[int, int], tuple[bool, int, int] | None] = {}
        for found in readers.values():
            for i, one in enumerate(found):
                for other in found[i + 1 : i + 1 + _PAIRS]:
                    if (one.first, other.first) not in scores:
                        scores[one.first, other.first] = self._score(one, other)
        ranked = sorted((score, pair) for pair, score in scores.items() if score is not None)
        return sum(self._fuse(self._of[one], self._of[other]) for _, (one, other) in ranked) > 0

    def _score(self, one: _Kernel, other: _Kernel) -> tuple[bool, int, int] | None:
        """Less for those that are fused earlier; None for what cannot be."""
        parts = self._parts(one, other)
        if parts is None:
            return None
        shared = sum(self._bytes[s] for s in one.touched & other.touched)
        if one.crossed_by(other, parts):
            shared = parts[0].loop.hints[1] if parts[0].loop else 0  # in elements, as Inductor does
        return one.reduces != other.reduces, -shared, self._apart(one, other)

    def _parts(self, one: _Kernel, other: _Kernel) -> tuple[_Part, ...] | None:
        """Those of a kernel of both; None if there is none."""
        if len(one.parts) == len(other.parts) == 2:
            rows, columns = (a.with_(b) for a, b in zip(one.parts, other.parts, strict=True))
            apart = rows is not None and columns is not None and rows.independent(columns)
            return (rows, columns) if rows and columns and apart else None
        both, single = (one, other.parts[0]) if len(one.parts) == 2 else (other, one.parts[0])
        if len(both.parts) == 2:
            return self._joining(both, single)
        part, joined = both.parts[0], both.parts[0].with_(single)
        if joined is not None:
            return (joined,)
        return self._crossing(part, single) or self._crossing(single, part)

    def _crossing(self, rows: _Part, columns: _Part) -> tuple[_Part, ...] | None:
        """Both, if one kernel reduces the rows and the columns of what they read."""
        if rows.loop is None or columns.loop is None or not rows.loop.crosses(columns.loop):
            return None
        whole = any(self._elements[s] == rows.loop.hints[1] for s in rows.touched & columns.touched)
        possible = whole and rows.independent(columns) and compat_fusion.most_reads_for_both()
        return (rows, columns) if possible else None

    def _joining(self, both: _Kernel, single: _Part) -> tuple[_Part, ...] | None:
        """The parts of one that reduces rows and columns, with another in either."""
        loop = single.loop
        if len(single.read.union(*(part.read for part in both.parts))) > compat_fusion.most_reads_for_both():
            return None
        for i, part in enumerate(both.parts):
            joined, rest = part.with_(single), both.parts[1 - i]
            if joined is None or loop is None or not joined.independent(rest):
                continue
            shared = sum(self._elements[s] for s in part.touched & single.touched)
            if not loop.reduces or shared >= loop.hints[1]:
                return (joined, rest) if i == 0 else (rest, joined)
        return None

    def _apart(self, one: _Kernel, other: _Kernel) -> int:
        """How far the last value of either is from the first of the other."""
        counted = self._counted
        return max(
            abs(counted[one.first] - counted[other.last]), abs(counted[other.first] - counted[one.last])
        )

    def _fuse(self, one: _Kernel, other: _Kernel) -> bool:
        """Make one kernel of two, unless something between them runs elsewhere, or they are too far apart."""
        if one is other:
            return False
        first, second = (one, other) if one.position < other.position else (other, one)
        parts = self._parts(first, second)
        if parts is None:
            return False
        unread = second.needs.isdisjoint(first.values) and not first.crossed_by(second, parts)
        if unread and self._apart(first, second) > _DISTANCE:
            return False
        bits = first.bits | second.bits
        needs = frozenset(n for n in first.needs | second.needs if not bits >> n & 1)
        if any(self._above[n] & bits for n in needs):
            return False
        below = self._below(first, second.position)
        if any(self._of[n] in below for n in second.needs):
            return False
        self._move(first, second, below, _Kernel(parts, needs, 0))
        return True

    def _below(self, kernel: _Kernel, end: int) -> set[_Kernel]:
        """What is computed from a kernel's values, before a position."""
        below: set[_Kernel] = {kernel}
        for between in self._line[kernel.position + 1 : end]:
            if between is not None and any(self._of[n] in below for n in between.needs):
                below.add(between)
        return below - {kernel}

    def _move(self, first: _Kernel, second: _Kernel, below: set[_Kernel], together: _Kernel) -> None:
        """Put both, as one, behind everything between them that is not below the first."""
        start, end = first.position, second.position
        between = [k for k in self._line[start + 1 : end] if k is not None]
        line = [*(k for k in between if k not in below), together, *(k for k in between if k in below)]
        self._line[start : end + 1] = [*line, *[None] * (end + 1 - start - len(line))]
        for position, kernel in enumerate(line, start):
            kernel.position = position
        for index in together.values:
            self._of[index] = together

    def order(self) -> list[list[fx.Node]]:
        """Each kernel where its first value stands in the graph, and what it needs before it."""
        done: set[_Kernel] = set()
        kernels: list[list[fx.Node]] = []
        for start in self._of:
            stack = [(start, False)]
            while stack:
                kernel, ready = stack.pop()
                if ready:
                    kernels.append([self._nodes[i] for i in kernel.values])
                elif kernel not in done:
                    done.add(kernel)
                    stack.append((kernel, True))
                    stack += [(self._of[n], False) for n in sorted(kernel.needs, reverse=True)]
        return kernels


def maker_of(storage: fx.Node) -> fx.Node:
    """The call that makes a storage."""
    return storage.all_input_nodes[0] if compat.is_getitem(storage) else storage


def loop_of(node: fx.Node, elements: Size) -> Loop | None:
    """What a value is computed in; None where it runs by itself.

    Args:
        elements: of the loop over an elementwise value; 0 for none.
    """
    if not reduces(node):
        return Loop(elements, elements) if elements != 0 else None
    source = tensor(node.all_input_nodes[0])
    if source is None:
        return None
    reduced = _reduced(node, source)
    outer = prod(n for i, n in enumerate(source.shape) if i not in reduced)
    kept = {i for i, n in enumerate(source.shape) if i not in reduced and compat.exact(n) != 1}
    rows = bool(kept) and max(kept) < min(reduced)
    hints = compat.hint(outer), compat.hint(source.numel())
    return Loop(compat.exact(outer), compat.exact(source.numel()), True, rows, hints)


def reduces(node: fx.Node) -> bool:
    """Whether a value is reduced in a loop: of a few elements, each reader does it (``Reduction.create``)."""
    source = tensor(node.all_input_nodes[0]) if is_reduction(node) else None
    if source is None or tensor(node) is None or not compat.is_fusible(node):
        return is_reduction(node)
    count = compat.exact(prod(source.shape[i] for i in sorted(_reduced(node, source))))
    return not isinstance(count, int) or count >= compat_fusion.least_reduced()


def _reduced(node: fx.Node, source: torch.Tensor) -> set[int]:
    """The dimensions that a reduction reduces."""
    given = node.args[1] if len(node.args) > 1 else None
    dims = [given] if isinstance(given, int) else given
    if not isinstance(dims, Sequence) or not dims:
        dims = range(source.dim())
    return {d % max(1, source.dim()) for d in dims if isinstance(d, int)}


def _counted(loops: Mapping[fx.Node, Loop | None], made: Mapping[fx.Node, Iterable[fx.Node]]) -> list[int]:
    """Where each value stands in Inductor's list, which has all results of calls and steps of reductions."""
    counted, place = [], 0
    for node, loop in loops.items():
        counted.append(place)
        if loop is None:
            place += 1 + sum(result is not node for result in made[node])
        elif loop.reduces and not loop.rows and loop.hints[1] >= _TWO_STEPS * loop.hints[0]:
            place += 2
        else:
            place += 1
    return counted


def _elements(storage: fx.Node) -> int:
    value = tensor(storage)
    return 0 if value is None else compat.hint(value.numel())


def _itemsize(storage: fx.Node) -> int:
    value = tensor(storage)
    return 0 if value is None else value.dtype.itemsize
