"""Which values of a graph Inductor writes to memory, and in which order, before it has been asked.

After torch._inductor's lowering (what is computed inside its readers: ``ir.StorageBox``) and its scheduler
(what shares a kernel, and when that runs: ``Scheduler.fuse_nodes``, ``topological_sort_schedule``), for
elementwise values and reductions; layouts, tilings and its estimates of traffic are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from . import compat, markers
from .capture import extent, owner, tensor
from .classify import is_reduction, packet
from .codecs import Bitmask, get_codec
from .codecs.base import Size
from .fusion import decoded_to_memory, is_external, readers

aten = torch.ops.aten
#: Ops that add to places of a buffer -> which argument says what; computed in their loop over it.
_SCATTERED: dict[object, int] = {
    aten.index_put: 2,
    aten._unsafe_index_put: 2,
    aten._unsafe_masked_index_put_accumulate: 3,
}
#: Write a buffer of their own, and compute there what they put into it.
_GATHERING = {*_SCATTERED, aten.cat, aten.scatter}
#: Read their first argument where their other ones say.
_PLACED = {aten.index, aten.gather, aten.embedding}
_DISTANCE = 64  # kernels: values that read the same are not computed together from further apart

Stored = Mapping[fx.Node, frozenset[fx.Node]]


@dataclass(frozen=True)
class Schedule:
    """What a graph writes to memory, kernel by kernel.

    Attributes:
        kernels: the values that write memory, in order, those of one kernel together.
        buffered: of each kernel, those that get a buffer; the others stay in registers, or write into inputs.
        last_use: the last kernel that reads a storage; for what the graph returns, the one after all.
    """

    stored: Stored
    kernels: Sequence[Sequence[fx.Node]]
    buffered: Sequence[Sequence[fx.Node]]
    last_use: Mapping[fx.Node, int]

    @classmethod
    def of(cls, graph: fx.Graph) -> Schedule:
        """That of Inductor, as far as it is expected."""
        returned = {owner(n) for n in output_nodes(graph)}
        stored = stored_values(graph, returned)
        kernels = in_kernels(stored)
        step = {node: i for i, kernel in enumerate(kernels) for node in kernel}
        readers: dict[fx.Node, set[int]] = {}  # storage -> kernels that read it
        for node, storages in stored.items():
            for storage in storages:
                readers.setdefault(storage, set()).add(step[node])
        buffered = [
            [n for n in kernel if not overwrites(n) and (n in returned or readers.get(n) != {now})]
            for now, kernel in enumerate(kernels)
        ]
        last_use = {s: max(steps) for s, steps in readers.items()} | dict.fromkeys(returned, len(kernels))
        return cls(stored, kernels, buffered, last_use)


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """What the graph returns, numbers left out."""
    (values,) = graph.output_node().args
    assert isinstance(values, (tuple, list))
    return [v for v in values if isinstance(v, fx.Node)]


def overwrites(node: fx.Node) -> bool:
    """Whether the node writes into an input: its kernel stores there and nowhere else."""
    return node.target is aten.copy_.default


def stored_values(graph: fx.Graph, returned: set[fx.Node]) -> Stored:
    """Nodes that write memory, in order, and the storages that each of them reads.

    The others run inside their readers, which then read what they would have read.
    """
    stored: dict[fx.Node, frozenset[fx.Node]] = {}
    reads: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        if "val" in node.meta and compat.is_symbolic(node):  # a size, which code on the host computes
            reads[node] = frozenset()
            continue
        if node.op != "call_function":
            reads[node] = frozenset((owner(node),))
            continue
        sources = frozenset[fx.Node]().union(*(reads[i] for i in node.all_input_nodes))
        if compat.is_getitem(node):
            reads[node] = sources if compat.is_view(node.all_input_nodes[0]) else frozenset((node,))
        elif not compat.is_view(node) and (overwrites(node) or _is_stored(node, returned, len(sources))):
            stored[node] = sources
            reads[node] = frozenset((node,))
        else:
            reads[node] = sources
    return stored


def _is_stored(node: fx.Node, returned: set[fx.Node], reads: int) -> bool:
    """Whether a value gets a buffer, of which the computation reads so many others."""
    if markers.is_marker(node, markers.decode):
        return decoded_to_memory(node)
    if node in returned or is_reduction(node):
        return True
    if packet(node) is aten.cat:  # each of its inputs writes its part, unless the reader can choose one
        return not all(map(compat.is_pointwise, readers(node)))
    if not compat.is_pointwise(node) or any(map(_reads_memory, readers(node))):
        return True
    if any(packet(user) is aten.as_strided for user in node.users):
        return True  # which is of memory, whatever it is a view of
    return reads > compat.most_reads(reused=len(node.users) > 1)


def _reads_memory(reader: fx.Node) -> bool:
    inside = compat.is_pointwise(reader) or is_reduction(reader) or overwrites(reader)
    if markers.is_marker(reader, markers.encode):
        return not isinstance(get_codec(str(reader.args[1])), Bitmask)  # the others have kernels
    return not inside and packet(reader) not in _GATHERING


def in_kernels(stored: Stored) -> list[list[fx.Node]]:
    """The stored values in the order in which Inductor makes them, those of one kernel together."""
    fusion = _Fusion(stored)
    latest: dict[fx.Node, int] = {}  # storage -> the last value of its size that reads or makes it
    for index, node in enumerate(stored):
        if is_reduction(node):
            latest[node] = index  # its results may be used before it leaves the kernel
            continue
        size = _elements(node)
        for storage in sorted(stored[node], key=lambda s: s.name) if size != 0 else ():
            if extent(storage) == size:
                if storage in latest:
                    fusion.fuse(latest[storage], index)
                latest[storage] = index
        if compat.is_pointwise(node):
            latest[node] = index
    return fusion.order()


def written_over(
    kernel: Sequence[fx.Node], stored: Stored, dying: Mapping[fx.Node, Size], made: Mapping[fx.Node, Size]
) -> set[fx.Node]:
    """The storages that a kernel's results take the place of (scheduler.py, ``decide_inplace_update``).

    A value is written over one that it reads, of its size and dtype, where nothing but what it is computed
    from still reads that, each element where it is written. A library's call writes over nothing.

    Args:
        dying: bytes of what is last used here.
        made: bytes of what gets a buffer here.
    """
    over = set[fx.Node]()
    above: dict[fx.Node, set[fx.Node]] = {}  # of the same kernel, what each is computed from, and itself
    users: dict[fx.Node, set[fx.Node]] = {}
    elsewhere = set[fx.Node]()
    for node in () if is_external(kernel[0]) else kernel:
        above[node] = {node}.union(*(above.get(_maker(s), ()) for s in stored[node]))
        for storage in stored[node]:
            users.setdefault(storage, set()).add(node)
        elsewhere |= _read_elsewhere(node, stored)
    for node in above:
        for storage in sorted(stored[node] - over - elsewhere, key=lambda s: s.name) if node in made else ():
            alike = dying.get(storage) == made[node] and _dtype(storage) == _dtype(node)
            if alike and users[storage] <= above[node]:
                over.add(storage)
                break
    return over


def _read_elsewhere(node: fx.Node, stored: Stored) -> set[fx.Node]:
    """The storages that a value is computed from, but not each element from the same one."""
    found, stack, seen = set[fx.Node](), [(node, False)], set[tuple[fx.Node, bool]]()
    while stack:
        reader, placed = stack.pop()
        for index, source in enumerate(reader.all_input_nodes):
            base, moved = owner(source), placed or (index == 0 and packet(reader) in _PLACED)
            if moved and base in stored[node]:
                found.add(base)
            if base not in stored[node] and base not in stored and (base, moved) not in seen:
                seen.add((base, moved))
                stack.append((base, moved))
    return found


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = tensor(node)
    return None if value is None else value.dtype


def _elements(node: fx.Node) -> Size:
    """How many elements the loop over a value has; 0 where it is none of Inductor's simple ones."""
    if packet(node) in _SCATTERED:
        values = node.args[_SCATTERED[packet(node)]]
        return extent(values) if isinstance(values, fx.Node) else 0
    return extent(node) if compat.is_pointwise(node) else 0


class _Fusion:
    """Kernels, each a set of values (by their places in the graph), and what they need."""

    def __init__(self, stored: Stored) -> None:
        self._nodes = list(stored)
        place = {node: i for i, node in enumerate(self._nodes)}
        makers = ({_maker(s) for s in storages} for storages in stored.values())
        self._needs = [sorted(place[m] for m in found if m in place) for found in makers]
        self._above: list[int] = []  # what each is computed from, as bits
        for needs in self._needs:
            above = 0
            for index in needs:
                above |= self._above[index] | 1 << index
            self._above.append(above)
        self._kernel = [[i] for i in range(len(self._nodes))]  # value -> all of its kernel

    def fuse(self, first: int, second: int) -> None:
        """Put two values in one kernel, unless something between them runs elsewhere, or is too much."""
        kernel, other = self._kernel[first], self._kernel[second]
        if kernel is other:
            return
        both = {*kernel, *other}
        bits = sum(1 << i for i in both)
        needed = {n for i in both for n in self._needs[i]} - both
        reads_it = any(n in kernel for i in other for n in self._needs[i])
        far = max(both) - min(both) > _DISTANCE and not reads_it
        if far or any(self._above[n] & bits for n in needed):
            return
        kernel += other
        for index in other:
            self._kernel[index] = kernel

    def order(self) -> list[list[fx.Node]]:
        """Each kernel where its first value stands in the graph, and what it needs before it."""
        done: set[int] = set()  # by the first value of a kernel
        kernels: list[list[fx.Node]] = []
        for start in range(len(self._nodes)):
            stack = [(start, False)]
            while stack:
                index, ready = stack.pop()
                kernel = self._kernel[index]
                if ready:
                    kernels.append([self._nodes[i] for i in sorted(kernel)])
                elif min(kernel) not in done:
                    done.add(min(kernel))
                    stack.append((index, True))
                    needs = sorted({n for i in kernel for n in self._needs[i]} - set(kernel))
                    stack += [(n, False) for n in reversed(needs)]
        return kernels


def _maker(storage: fx.Node) -> fx.Node:
    """The call that makes a storage."""
    return storage.all_input_nodes[0] if compat.is_getitem(storage) else storage
