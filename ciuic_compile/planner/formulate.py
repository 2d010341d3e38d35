"""From a joint graph to the problem of ``program.py``: what may be stored or rebuilt, and is alive when.

Steps are the ops of the forward, in order, and then those of the backward. Like ``simulate.py``: what
Inductor fuses into its readers takes no memory and reads its inputs when they run; everything else is
alive from the step that makes it to the last that reads it. An elementwise result counts from the step
after, since it may take the place of an input that dies there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from torch import fx

from .. import compat, compat_fusion
from ..analyze import BITMASK, MemoryModel
from ..capture import owner, tensor
from ..classify import is_attention, is_contraction, is_reduction
from ..fusion import is_external
from ..simulate import tensor_bytes
from .assign import Option
from .program import ABSENT, Candidate, Decision, Problem, Rebuild, Store
from .select import may_rebuild
from .timing import node_us

#: A gradient error of 5.4% (torch's fp8 pass has it, DESIGN.md) weighs as much as a tenth of a step.
_ERROR_AS_TIME = 0.1 / 0.054**2

#: A fused value is computed by at most so many kernels: longer chains are written to memory on the way.
_MOST_KERNELS = 3

#: What is not larger than this share of a value counts for nothing beside it.
_SMALL = 0.05


@dataclass(frozen=True)
class Formulation:
    """A planning problem without limits, and the graph's nodes behind its candidates.

    Attributes:
        steps: of the backward's nodes, by name.
    """

    problem: Problem
    nodes: tuple[fx.Node, ...]
    model: MemoryModel
    steps: Mapping[str, int]

    def decision(self, saved: Iterable[fx.Node], codecs: Mapping[fx.Node, str | None]) -> Decision:
        """The decision that stores these nodes with these codecs."""
        stored = {owner(n) for n in saved}
        choices = []
        for node, candidate in zip(self.nodes, self.problem.candidates, strict=True):
            names = [store.codec for store in candidate.stores]
            wanted = codecs.get(node)
            choices.append(names.index(wanted) if node in stored and wanted in names else ABSENT)
        return tuple(choices)

    def stored(self, decision: Decision) -> dict[fx.Node, str | None]:
        """The candidates that are stored, with their codecs."""
        pairs = zip(self.nodes, self.problem.candidates, decision, strict=True)
        return {n: c.stores[choice].codec for n, c, choice in pairs if choice != ABSENT}

    def saved(self, decision: Decision) -> tuple[fx.Node, ...]:
        """All that lives from forward to backward, in graph order: stored, inputs, sizes and outputs."""
        captured = self.model.captured
        stored, always = self.stored(decision), self.model.classes.pinned
        found: set[fx.Node] = set()
        stack = [n for n in captured.graph.nodes if n.op != "output" and captured.is_backward(n)]
        stack += [n for n in captured.bwd_outputs if not captured.is_backward(n)]
        seen = set(stack)
        while stack:
            for node in stack.pop().all_input_nodes:
                if node in seen or captured.is_backward(node):
                    continue
                seen.add(node)
                if node in stored or node in always or compat.is_symbolic(node):
                    found.add(node)
                else:
                    stack.append(node)
        return tuple(sorted(found, key=captured.order.__getitem__))


def formulate(
    model: MemoryModel, options: Mapping[fx.Node, Sequence[Option]], favoured: Iterable[fx.Node]
) -> Formulation:
    """The problem of one joint graph.

    Args:
        options: ways to store each node that :func:`storable` names, as it is first.
        favoured: nodes that stay candidates even where storing what they are computed from is as good.
    """
    return _Builder(model, options, frozenset(favoured)).build()


def error_as_us(model: MemoryModel) -> float:
    """Microseconds that a unit of the gradients' relative variance weighs as much as."""
    return _ERROR_AS_TIME * _Builder(model, {}, frozenset()).step_us


def storable(model: MemoryModel) -> list[fx.Node]:
    """Owners of the forward's storages that could live on to the backward, in order."""
    return [
        n
        for n in model.captured.savable
        if n.op == "call_function"
        and tensor(n) is not None
        and owner(n) is n
        and n not in model.classes.pinned
    ]


@dataclass
class _Builder:
    model: MemoryModel
    options: Mapping[fx.Node, Sequence[Option]]
    favoured: frozenset[fx.Node]
    step: dict[fx.Node, int] = field(default_factory=dict)
    runs: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)  # first and last step that computes it
    _materialized: tuple[dict[fx.Node, bool], dict[fx.Node, bool]] = field(default_factory=lambda: ({}, {}))

    def build(self) -> Formulation:
        self._number()
        candidates, nodes = self._candidates()
        problem = Problem(
            self.forward_steps,
            tuple(self._base(set(nodes))),
            tuple(candidates),
            variance_weight=_ERROR_AS_TIME * self.step_us,
        )
        steps = {node.name: self.step[node] for node in self._backward}
        return Formulation(problem, tuple(nodes), self.model, steps)

    # ------------------------------------------------------------ steps

    def _number(self) -> None:
        """A step for every op; late values (parts of derivatives) run with the last of their inputs."""
        captured, counter = self.model.captured, 0
        early = self.model.classes.used_forward
        for node in captured.savable:
            if _is_op(node) and node in early:
                self.step[node] = counter
                counter += 1
            else:
                self.step[node] = max(
                    (self.step[i] for i in node.all_input_nodes if i in self.step), default=0
                )
        self.forward_steps = counter = max(counter, 1)
        for node in self._backward:
            self.step[node] = counter - (not _is_op(node))
            counter += _is_op(node)
        self.steps = max(counter, self.forward_steps + 1)
        for node in reversed(self._backward):
            self.runs[node] = self._when(node, self._backward_set)
        for node in reversed(captured.savable):
            if node in early:
                self.runs[node] = self._when(node, early)

    def _when(self, node: fx.Node, among: set[fx.Node]) -> tuple[int, int]:
        """Its own step if it writes to memory; else those of its readers."""
        users = [self.runs[u] for u in node.users if u in among and u in self.runs]
        if self.materialized(node, among) or not users:
            return self.step[node], self.step[node]
        return min(a for a, _ in users), max(b for _, b in users)

    @cached_property
    def _backward(self) -> list[fx.Node]:
        captured = self.model.captured
        return [n for n in captured.graph.nodes if n.op == "call_function" and captured.is_backward(n)]

    @cached_property
    def _backward_set(self) -> set[fx.Node]:
        return set(self._backward)

    @cached_property
    def _all(self) -> set[fx.Node]:
        return set(self.model.captured.graph.nodes)

    def materialized(self, node: fx.Node, among: set[fx.Node]) -> bool:
        """Whether the value gets a buffer of its own when only these nodes read it."""
        known = self._materialized[among is self._backward_set]
        if node not in known:  # asked for several times a node
            known[node] = self._is_materialized(node, among)
        return known[node]

    def _is_materialized(self, node: fx.Node, among: set[fx.Node]) -> bool:
        if not _is_op(node):
            return False
        if not compat.is_fusible(node) or is_reduction(node):
            return True
        readers = _readers(node, among)
        if any(u.op == "output" or is_external(u) for u in readers):
            return True
        return len(readers) > 1 and len(self._loads[node]) > compat_fusion.most_reads(reused=True)

    @cached_property
    def _loads(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """The buffers that an elementwise value is computed from, through what is fused into it."""
        loads: dict[fx.Node, frozenset[fx.Node]] = {}
        most = compat_fusion.most_reads(reused=True)
        for node in self.model.captured.graph.nodes:
            if node.op == "output":
                continue
            found: set[fx.Node] = set()
            for source in node.all_input_nodes:
                fused = compat.is_fusible(source) or not _is_op(source)
                found |= loads[source] if fused and 0 < len(loads[source]) <= most else {source}
            loads[node] = frozenset(found)
        return loads

    # ------------------------------------------------------------ candidates

    def _candidates(self) -> tuple[list[Candidate], list[fx.Node]]:
        reads = {n: self._reads(n) for n in self.options}
        inputs = {n: self._rebuilt_from(n) for n in self.options}
        after = self._computed_from()
        for node in self.options:  # what is not worth storing: its readers read its inputs
            sources = inputs[node]
            if sources is None or not self._is_inlined(node, sources):
                continue
            for source in sources:
                reads[source] = _ends(reads[source] + reads[node])
            for other in after[node]:
                given = inputs.get(other) or ()
                if node in given:
                    inputs[other] = tuple(
                        dict.fromkeys(j for i in given for j in (sources if i is node else (i,)))
                    )
            for source in sources:
                after[source] += after[node]
            del reads[node], inputs[node]
        wanted: set[fx.Node] = set()
        for node in reversed(list(reads)):
            if reads[node] or node in wanted:
                wanted |= {node, *(inputs[node] or ())}
        nodes = [n for n in reads if n in wanted]
        index = {n: i for i, n in enumerate(nodes)}
        return [self._candidate(n, reads[n], inputs[n], index) for n in nodes], nodes

    def _is_inlined(self, node: fx.Node, sources: Sequence[fx.Node]) -> bool:
        """Whether a fused value is never better stored than the one large value it is computed from."""
        if node in self.favoured or _maker(node) is not node or not self._is_fused(node):
            return False
        size = tensor_bytes(node.meta["val"])
        large = [n for n in sources if tensor_bytes(n.meta["val"]) > _SMALL * size]
        return not large or (len(large) == 1 and tensor_bytes(large[0].meta["val"]) <= size)

    def _is_fused(self, node: fx.Node) -> bool:
        """Whether the value takes memory only if it is stored."""
        if self._is_written(node):
            return False
        return not any(is_external(u) for u in _readers(node, self._backward_set))

    def _computed_from(self) -> dict[fx.Node, list[fx.Node]]:
        """For each storage, those that are computed from it directly."""
        found: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.options}
        for node in self.options:
            for source in dict.fromkeys(map(owner, _maker(node).all_input_nodes)):
                if source in found:
                    found[source].append(node)
        return found

    def _candidate(
        self,
        node: fx.Node,
        reads: tuple[int, ...],
        inputs: tuple[fx.Node, ...] | None,
        index: Mapping[fx.Node, int],
    ) -> Candidate:
        size, early = tensor_bytes(node.meta["val"]), self.model.classes.used_forward
        after = [self.runs[u][1] for u in _readers(node, early) if u in self.runs]
        made = self.step[node]
        last_use = min(max(after, default=made), self.forward_steps - 1)
        shift = compat.is_fusible(_maker(node)) and last_use > made
        written_us = 0.0 if self._is_written(node) else self.model.device.microseconds(size)
        stores = tuple(
            Store(size, written_us)
            if o.codec is None
            else Store(o.nbytes, o.time_us, o.variance, o.codec, self._unpacked(node, o))
            for o in self.options[node]
        )
        rebuild = None
        if inputs is not None:
            rebuild = Rebuild(self._rebuild_us(node), tuple(sorted({index[i] for i in inputs})))
        fused = rebuild is not None and _maker(node) is node and self._is_fused(node)
        if compat.must_recompute(_maker(node)):
            stores = ()
        return Candidate(
            node.name, size, made + shift, last_use, reads, stores, rebuild, fused,
            group=self._group(node, len(stores), rebuild is not None, bool(reads)),
        )  # fmt: skip

    def _reads(self, node: fx.Node) -> tuple[int, ...]:
        """First and last backward step that reads the value, directly or through views."""
        spans = [self.runs[u] for u in _readers(node, self._backward_set) if u in self.runs]
        if any(u.op == "output" for u in _readers(node, self._backward_set)):
            spans.append((self.steps - 1, self.steps - 1))  # a gradient that needs no backward
        return _ends([t for span in spans for t in span])

    def _rebuilt_from(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        """The candidates that computing the value again reads; None where it cannot be computed again."""
        captured, maker = self.model.captured, _maker(node)
        if not all(self._may_rebuild(n) for n in {node, maker}):
            return None
        found: dict[fx.Node, None] = {}
        for source in map(owner, maker.all_input_nodes):
            if source in captured.mutated:
                return None  # the backward would read what the forward wrote there
            if source in self.options:
                found[source] = None
            elif source not in self.model.classes.pinned and not compat.is_symbolic(source):
                if source.op == "call_function" and source.all_input_nodes:
                    return None
        return tuple(found)

    def _may_rebuild(self, node: fx.Node) -> bool:
        lossy = self.model.config.lossy
        if compat.must_recompute(node):
            return True
        if is_contraction(node) and not lossy:  # exact inputs, so it comes out the same
            fixed = compat.is_random(node) or compat.is_collective(node) or is_attention(node)
            return not fixed and not compat.must_save(node)
        if compat.is_getitem(node):
            return not compat.must_save(node)
        return may_rebuild(node, self.model.classes, set(), lossy)

    def _is_written(self, node: fx.Node) -> bool:
        """Whether the forward writes the value to memory even if it is not stored."""
        early = self.model.classes.used_forward
        return node in early and self.materialized(_maker(node), early)

    def _rebuild_us(self, node: fx.Node) -> float:
        """Of an op with several results each pays its share.

        One that is fused into its readers writes nothing: each reads its inputs where it would read it.
        """
        maker, device = _maker(node), self.model.device
        if maker is not node or not compat.is_fusible(node):
            return node_us(maker, device) / max(1, len(maker.users) if maker is not node else 1)
        size, written = tensor_bytes(node.meta["val"]), self.materialized(node, self._backward_set)
        read = self._bytes_read(node, shared=written and not self._gives_gradients(node))
        if written:
            return device.microseconds(read + size)
        return device.microseconds(max(0, read - size) * self._kernels_reading(node))

    def _kernels_reading(self, node: fx.Node) -> int:
        """Kernels of the backward that compute a fused value: its reader's, and those of what it makes."""
        direct = bool(_readers(node, self._backward_set))
        early = self.model.classes.used_forward
        chained = sum(u in self.options and self._may_rebuild(u) for u in _readers(node, early))
        return max(1, min(direct + chained, _MOST_KERNELS))

    def _bytes_read(self, node: fx.Node, shared: bool) -> int:
        """What an elementwise op reads: each input, or what that is computed from, and nothing twice.

        Args:
            shared: whether it may run in a kernel that reads the same for a derivative, at no cost.
        """

        def moved(source: fx.Node) -> int:
            return 0 if shared and self._is_read_anyway(source) else _elements_read(source, node)

        found: dict[fx.Node, int] = {}
        for source in node.all_input_nodes:
            way = {source: moved(source)}
            if _is_op(source) and compat.is_fusible(source) and self._loads[source]:
                behind = {i: moved(i) for i in self._loads[source]}
                way = behind if sum(behind.values()) <= sum(way.values()) else way
            found |= way
        return sum(found.values())

    def _gives_gradients(self, node: fx.Node) -> bool:
        """Whether a convolution's or an attention's backward reads the value: derivatives come after it."""
        readers = _readers(node, self._backward_set)
        return any(is_external(u) and isinstance(u.meta.get("val"), (tuple, list)) for u in readers)

    def _is_read_anyway(self, node: fx.Node) -> bool:
        """Whether derivatives read the value elementwise, or something that is fused and computed from it.

        GELU's reads what GELU reads, and Inductor makes one kernel of both.
        """
        early = self.model.classes.used_forward
        stack, seen = [owner(node)], {owner(node)}
        while stack:
            for reader in _readers(stack.pop(), self._all):
                if not _is_op(reader) or not compat.is_fusible(reader) or is_reduction(reader):
                    continue
                if reader not in early:
                    return True
                if reader not in seen and not self.materialized(reader, early):
                    seen.add(reader)
                    stack.append(reader)
        return False

    def _unpacked(self, node: fx.Node, option: Option) -> bool:
        """Whether the decode is stored (see ``fusion.decoded_to_memory``); a mask's only to be in memory."""
        if option.codec is None:
            return False
        fuses = option.codec == BITMASK
        stack, seen = [node], {node}
        while stack:
            for reader in _readers(stack.pop(), self._backward_set):
                if is_external(reader) or (is_reduction(reader) and not fuses):
                    return True
                if reader not in seen and not self.materialized(reader, self._backward_set):
                    seen.add(reader)
                    stack.append(reader)
        return False

    def _group(self, node: fx.Node, *options: object) -> str:
        """The same for the same tensor of identical layers: line, module and shape, numbers left out."""
        source = self.model.source(node)
        module = re.sub(r"\d+", "#", source.module)
        return f"{module} {source.line} {node.target} {tuple(map(str, node.meta['val'].shape))} {options}"

    # ------------------------------------------------------------ the rest

    def _base(self, candidates: set[fx.Node]) -> list[int]:
        """Bytes alive at each step whatever is decided: gradients, outputs, values nobody asks for."""
        captured, early = self.model.captured, self.model.classes.used_forward
        delta = [0] * (self.steps + 1)
        ends = {owner(n) for n in (*captured.fwd_outputs, *captured.bwd_outputs)}
        for node in captured.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder":
                if captured.is_backward(node):
                    _alive(delta, tensor_bytes(value), self.forward_steps, self.steps - 1)
                continue
            among = self._backward_set if node in self._backward_set else early
            if node not in among or node in candidates or owner(node) is not node or tensor(node) is None:
                continue
            if not (self.materialized(_maker(node), among) or node in ends):
                continue
            after = [self.runs[u][1] for u in _readers(node, among) if u in self.runs]
            start = self.step[node]
            stop = self.steps - 1 if node in ends else max(after, default=start)
            start += compat.is_fusible(_maker(node)) and stop > start
            _alive(delta, tensor_bytes(value), start, stop)
        live = 0
        return [live := live + change for change in delta[:-1]]

    @cached_property
    def step_us(self) -> float:
        """Predicted time of a step, of what writes to memory."""
        early = self.model.classes.used_forward
        total = sum(
            node_us(n, self.model.device) for n in self._backward if self.materialized(n, self._backward_set)
        )
        forward = (n for n in self.model.captured.savable if n in early and self.materialized(n, early))
        return max(1.0, ceil(total + sum(node_us(n, self.model.device) for n in forward)))


def _ends(steps: Sequence[int]) -> tuple[int, ...]:
    """First and last: what is alive at both is alive in between."""
    return tuple(sorted({min(steps), max(steps)})) if steps else ()


def _alive(delta: list[int], nbytes: int, start: int, stop: int) -> None:
    delta[start] += nbytes
    delta[stop + 1] -= nbytes


def _elements_read(source: fx.Node, node: fx.Node) -> int:
    """Bytes of one element for each of the node's own, at most: gathers and slices read less than all."""
    value, result = tensor(source), tensor(node)
    if value is None or result is None:
        return 0
    return min(tensor_bytes(value), compat.hint(result.numel()) * value.dtype.itemsize)


def _is_op(node: fx.Node) -> bool:
    """Whether the node computes something (views, getitems and sizes do not)."""
    passive = compat.is_view(node) or compat.is_getitem(node) or compat.is_symbolic(node)
    return node.op == "call_function" and not passive


def _maker(node: fx.Node) -> fx.Node:
    """The op behind one of several results."""
    source = node.args[0] if compat.is_getitem(node) else node
    assert isinstance(source, fx.Node)
    return source


def _readers(node: fx.Node, among: set[fx.Node]) -> list[fx.Node]:
    """Those of ``among`` (and the graph's output) that read the value, directly or through views."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if compat.is_view(user) or (compat.is_getitem(user) and compat.is_view(_maker(user))):
                stack.append(user)
            elif compat.is_getitem(user):
                found.update(dict.fromkeys(_readers(user, among)))
            elif user in among or user.op == "output":
                found[user] = None
    return list(found)
