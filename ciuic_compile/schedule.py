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

from . import compat, compat_fusion, markers
from .capture import extent, owner, tensor
from .classify import packet
from .codecs import Bitmask, get_codec
from .codecs.base import Size
from .fusion import decoded_to_memory, is_external, read_from_memory, readers
from .kernels import by_last_value, grouped, loop_of, maker_of, reduces

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
#: Operations for each input, where a reader chooses one (counted in torch 2.11: 7 k - 1 for k inputs).
_CAT_OPS = 7

Stored = Mapping[fx.Node, frozenset[fx.Node]]


@dataclass(frozen=True)
class Schedule:
    """What a graph writes to memory, kernel by kernel.

    Attributes:
        kernels: the values that write memory, in order, those of one kernel together.
        buffered: of each kernel, those that get a buffer; the others stay inside, or write into inputs.
        inside: storages that are made and read by one kernel alone, and stay in its registers.
        last_use: the last kernel that reads a storage; for what the graph returns, the one after all.
    """

    stored: Stored
    kernels: Sequence[Sequence[fx.Node]]
    buffered: Sequence[Sequence[fx.Node]]
    inside: frozenset[fx.Node]
    last_use: Mapping[fx.Node, int]

    @classmethod
    def of(cls, graph: fx.Graph) -> Schedule:
        """That of Inductor, as far as it is expected."""
        returned = {owner(n) for n in output_nodes(graph)}
        stored = stored_values(graph, returned)
        return cls._in_order(in_kernels(stored), stored, returned)

    def by_last_value(self) -> Schedule:
        """The same kernels as ``compat_order.py`` orders them; itself where that changes nothing."""
        kernels = by_last_value(self.kernels, self.stored)
        if kernels == self.kernels:
            return self
        returned = {storage for storage, last in self.last_use.items() if last == len(self.kernels)}
        return self._in_order(kernels, self.stored, returned)

    @classmethod
    def _in_order(
        cls, kernels: Sequence[Sequence[fx.Node]], stored: Stored, returned: set[fx.Node]
    ) -> Schedule:
        step = {node: i for i, kernel in enumerate(kernels) for node in kernel}
        readers: dict[fx.Node, set[int]] = {}  # storage -> kernels that read it
        for node, storages in stored.items():
            for storage in storages:
                readers.setdefault(storage, set()).add(step[node])
        inside = frozenset(
            s for s, steps in readers.items() if s not in returned and steps == {step.get(maker_of(s))}
        )
        buffered = [[n for n in kernel if not overwrites(n) and n not in inside] for kernel in kernels]
        last_use = {s: max(steps) for s, steps in readers.items()} | dict.fromkeys(returned, len(kernels))
        return cls(stored, kernels, buffered, inside, last_use)


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
        return read_from_memory(node) if _is_bitmask(node) else decoded_to_memory(node)
    if node in returned or reduces(node):
        return True
    if packet(node) is aten.cat:
        return not _chosen_in_readers(node) or _CAT_OPS * len(node.all_input_nodes) > compat_fusion.most_ops()
    if not compat.is_pointwise(node) or any(map(_reads_memory, readers(node))):
        return True
    if any(packet(user) is aten.as_strided for user in node.users):
        return True  # which is of memory, whatever it is a view of
    return reads > compat_fusion.most_reads(reused=_is_reused(node))


def _chosen_in_readers(cat: fx.Node) -> bool:
    """Whether readers choose one of its inputs for each element; else each of those writes its part."""
    return all(map(compat.is_pointwise, readers(cat)))


def _is_reused(value: fx.Node) -> bool:
    """Whether Inductor takes a value to be read again: by several, or wherever it is broadcast to."""
    broadcast = compat_fusion.counts_broadcasts() and any(_broadcasts(user, value) for user in value.users)
    viewed = any(compat.is_view(user) and _is_reused(user) for user in value.users)
    return len(value.users) > 1 or broadcast or viewed


def _broadcasts(reader: fx.Node, value: fx.Node) -> bool:
    """Whether a reader has each element of a value at two places or more (lowering.py, ``expand``)."""
    elementwise = compat.is_fusible(reader) and packet(reader) not in _PLACED
    made, read = tensor(reader), tensor(value)
    if made is None or read is None or not (elementwise or packet(reader) is aten.select_scatter):
        return False
    return compat.hint(made.numel()) >= 2 * compat.hint(read.numel()) > 0


def _reads_memory(reader: fx.Node) -> bool:
    inside = compat.is_pointwise(reader) or reduces(reader) or overwrites(reader)
    if markers.is_marker(reader, markers.encode):
        return not _is_bitmask(reader)  # the others have kernels
    return not inside and packet(reader) not in _GATHERING


def _is_bitmask(marker: fx.Node) -> bool:
    """Whether the codec is the one without kernels: Inductor computes it where it is read."""
    return isinstance(get_codec(str(marker.args[1])), Bitmask)


def in_kernels(stored: Stored) -> list[list[fx.Node]]:
    """The stored values in the order in which Inductor makes them, those of one kernel together."""
    return grouped(stored, {node: loop_of(node, _elements(node)) for node in stored})


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
    if not any(dying.get(storage) == made[n] for n in kernel if n in made for storage in stored[n]):
        return over  # most kernels
    above: dict[fx.Node, set[fx.Node]] = {}  # of the same kernel, what each is computed from, and itself
    users: dict[fx.Node, set[fx.Node]] = {}
    elsewhere = set[fx.Node]()
    for node in () if is_external(kernel[0]) else kernel:
        above[node] = {node}.union(*(above.get(maker_of(s), ()) for s in stored[node]))
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
    inside = compat.is_pointwise(node) or (packet(node) is aten.cat and _chosen_in_readers(node))
    return extent(node) if inside else 0
