"""An independent account of what rewritten graphs keep alive, to hold a plan against.

Shares no code with what makes the plan (``simulate.py``, ``schedule.py``, ``planner/``): storages are told
apart by the identity of fake tensors' storages, ops by the tags that torch gives them, and bytes are counted
by sweeping over the ends of the storages' lifetimes. Less is modelled than there: kernels move up only to one
that reads the same, an elementwise kernel always writes in place of what it reads for the last time, and
libraries' temporaries are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from . import compat
from .errors import PeakDisagreementError, VerificationError

aten = torch.ops.aten
prims = torch.ops.prims
#: Computed element by element where they are read, though torch does not tag them so.
_ELEMENTWISE = {
    aten.arange, aten.cat, aten.clone, aten.constant_pad_nd, aten.embedding, aten.empty, aten.empty_like,
    aten.empty_strided, aten.expand, aten.flip, aten.full, aten.full_like, aten.gather, aten.index,
    aten.index_select, aten.new_empty, aten.new_full, aten.new_zeros, aten.ones, aten.ones_like, aten.repeat,
    aten.scalar_tensor, aten.select_scatter, aten.slice_scatter, aten._to_copy, aten.tril, aten.triu,
    aten._unsafe_index, aten.zeros, aten.zeros_like, prims.convert_element_type, prims.fma,
    prims.inductor_lookup_seed, prims.inductor_random, prims.inductor_seed, prims.inductor_seeds, prims.iota,
}  # fmt: skip
#: Compute what they read in their own loops, and write a buffer: reductions, and what adds to places of one.
_WRITERS = {
    aten.all, aten.amax, aten.amin, aten.any, aten.argmax, aten.argmin, aten.cumsum, aten.index_put,
    aten.logsumexp, aten.max, aten.mean, aten.min, aten.prod, aten.scatter, aten.scatter_add, aten.std,
    aten.sum, aten._unsafe_index_put, aten._unsafe_masked_index_put_accumulate, aten.var, aten.var_mean,
    prims.prepare_softmax_online, prims.xor_sum,
}  # fmt: skip
_UNWRITTEN = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty}  # a kernel's result goes there
_FUSED = ("elementwise", "writer")
#: How far above the plan's simulated peak the audited one may be. Over seven models (bench.models), lossless
#: to 6:1, it was 26% below to 6% above at size "small" (planned for an H200, bf16), and up to 19% above at
#: size "tiny" (a UNet): which values are stored, and which computed again where they are read, is guessed in
#: two ways. One value is a large share of a tiny graph.
ALLOWANCE = 0.25
ALLOWED_BYTES = 2**20
_READS, _READS_REUSED = 8, 4  # buffers from which Inductor computes one value in its readers: its defaults


@dataclass(frozen=True)
class Audit:
    """Bytes above parameters and inputs: what is saved, and most alive in each graph."""

    saved: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """Most alive in the step."""
        return max(self.forward, self.backward)


def check(audited: Audit, saved: int, peak: int) -> None:
    """Refuse what a plan does not account for.

    Args:
        saved: bytes that the plan saves.
        peak: its simulated peak, in bytes.

    Raises:
        VerificationError: other bytes are saved.
        PeakDisagreementError: more are alive at once than :data:`ALLOWANCE` allows.
    """
    if audited.saved != saved:
        raise VerificationError(f"the rewritten graphs save {audited.saved} bytes, the plan says {saved}")
    if audited.peak > peak * (1 + ALLOWANCE) + ALLOWED_BYTES:
        raise PeakDisagreementError(
            f"the rewritten graphs keep {audited.peak} bytes alive at once by an independent account, "
            f"{peak} by the simulation"
        )


def audit(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int) -> Audit:
    """Count what two rewritten graphs keep alive, from them alone.

    Args:
        forward: returns ``num_fwd_outputs`` values for the user, then what is saved.
        backward: takes what is saved, then tangents; numbers may stand between.
    """
    there, here = _Lifetimes(forward), _Lifetimes(backward)
    outputs = _arguments(forward.output_node())
    user = there.storages(outputs[:num_fwd_outputs])
    sent = [v for v in outputs[num_fwd_outputs:] if there.storages([v])]
    saved = there.storages(sent)
    received = [n for n in backward.find_nodes(op="placeholder") if here.storages([n])]
    holders: dict[int, list[fx.Node]] = {storage: [] for storage in (*user, *saved)}
    for value, node in zip(sent, received, strict=False):
        for storage in there.storages([value]):
            holders[storage].append(node)
    end = len(backward.nodes)
    alive = [  # what the user holds is not freed
        (there.nbytes[storage], end if storage in user else here.last_use(nodes))
        for storage, nodes in holders.items()
    ]
    alive += [(_nbytes(n.meta["val"]), here.last_use([n])) for n in received[len(sent) :]]
    return Audit(
        saved=sum(there.nbytes[storage] for storage in saved),
        forward=there.peak(user | saved),
        backward=here.peak(here.storages(_arguments(backward.output_node())), alive),
    )


class _Lifetimes:
    """When the storages of a graph are made and last read.

    Attributes:
        nbytes: of each storage, by number; 0 for those that are there before (parameters, inputs).
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = list(graph.nodes)
        self._step = {node: step for step, node in enumerate(self._nodes)}
        self.nbytes: list[int] = []
        self._maker: list[fx.Node] = []  # by storage
        self._storages: dict[fx.Node, dict[int, int]] = {}  # node -> identity in torch -> storage
        for node in self._nodes:
            self._storages[node] = self._storages_of(node)
        makers = set(self._maker)
        self._kind = {n: _kind(n, n in makers) for n in self._nodes}
        self._stored = self._find_stored()
        self._until: dict[fx.Node, int] = {}  # step of the last kernel that reads the value
        for node in reversed(self._nodes):
            self._until[node] = max(map(self._reading, node.users), default=self._step[node])

    def storages(self, values: Iterable[object]) -> set[int]:
        """The storages behind values, numbers left out."""
        return {c for v in values if isinstance(v, fx.Node) for c in self._storages[v].values()}

    def last_use(self, nodes: Iterable[fx.Node]) -> int:
        """The step of the last kernel that reads one of the values; 0 where none does."""
        return max((self._until[n] for n in nodes if n.users), default=0)

    def peak(self, returned: set[int], alive: Sequence[tuple[int, int]] = ()) -> int:
        """Most bytes alive at once.

        Args:
            returned: storages that live to the end.
            alive: bytes that are there from the beginning, and until which step.
        """
        end = len(self._nodes)
        last = [self._step[maker] for maker in self._maker]
        for node, found in self._storages.items():
            if len(found) == 1:  # a part of several results is read through its own node
                (storage,) = found.values()
                last[storage] = end if storage in returned else max(last[storage], self._until[node])
        sizes, births = [size for size, _ in alive], [0] * len(alive)
        deaths = [self._free(until, -1) for _, until in alive]
        for storage, maker in enumerate(self._maker):
            made, until = self._step[maker], last[storage]
            inside = made == until and self._kind[maker] in _FUSED  # never leaves its kernel
            if self.nbytes[storage] and maker in self._stored and not inside:
                sizes.append(self.nbytes[storage])
                births.append(3 * made + 1)
                deaths.append(self._free(until, made))
        change = np.zeros(3 * end + 3, np.int64)
        np.add.at(change, births, sizes)
        np.subtract.at(change, deaths, sizes)
        return int(change.cumsum().max(initial=0))

    def _free(self, step: int, made: int) -> int:
        """When what a step reads last is free: before a kernel of Inductor's writes, in place, or after."""
        inside = made < step < len(self._nodes) and self._kind[self._nodes[step]] in _FUSED
        return 3 * step + (0 if inside and step else 2)

    def _storages_of(self, node: fx.Node) -> dict[int, int]:
        """A value shares the storage of what it is computed from, or has one of its own.

        Two nodes that have one fake value are not one storage: a copy of a node has the node's.
        """
        inherited: dict[int, int] = {}
        # Two calls of one subgraph have one fake result; it may not be an alias of what the call is given.
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            for source in node.all_input_nodes:
                inherited.update(self._storages[source])
        found = {}
        for value in _tensors(node.meta.get("val")):
            identity = value.untyped_storage()._cdata
            if identity not in inherited:
                inherited[identity] = len(self.nbytes)
                before = node.op != "call_function" or compat.packet(node) in _UNWRITTEN
                self.nbytes.append(0 if before else _nbytes(value))
                self._maker.append(node)
            found[identity] = inherited[identity]
        return found

    def _find_stored(self) -> set[fx.Node]:
        """Which values are written to memory; the others are computed in what reads them."""
        in_memory: set[fx.Node] = set()  # somebody reads it there, directly or through views
        for node in reversed(self._nodes):
            kinds = ((user, self._kind[user]) for user in node.users)
            if any(k in ("external", "output") or (k == "view" and u in in_memory) for u, k in kinds):
                in_memory.add(node)
        stored: set[fx.Node] = set()
        read_at: dict[int, int] = {}  # storage -> step of the last kernel of Inductor's that reads it
        reads: dict[fx.Node, frozenset[int]] = {}
        for node in self._nodes:
            kind, own = self._kind[node], frozenset(self._storages[node].values())
            sources = frozenset[int]().union(*(reads[i] for i in node.all_input_nodes))
            most = _READS_REUSED if len(node.users) > 1 else _READS
            if kind == "view":
                reads[node] = own & sources or sources
            elif kind == "elementwise" and node not in in_memory and len(sources) <= most:
                reads[node] = sources
            else:
                reads[node] = own
                stored.add(node)
                if kind in _FUSED:
                    self._join(node, sources, read_at)
        return stored

    def _join(self, node: fx.Node, sources: frozenset[int], read_at: dict[int, int]) -> None:
        """Compute a value in the last kernel that reads one of its sources, if the others are there."""
        ready = max((self._step[self._maker[s]] for s in sources), default=0)
        step = max((read_at[s] for s in sources if read_at.get(s, -1) >= ready), default=self._step[node])
        self._step[node] = step
        read_at.update(dict.fromkeys(sources, step))

    def _reading(self, user: fx.Node) -> int:
        """When a user reads: as it runs, or when what it is part of does."""
        return self._step[user] if user in self._stored else self._until[user]


def _kind(node: fx.Node, makes_storage: bool) -> str:
    """How a node runs: "input", "output", "view", "elementwise", as a "writer" of a buffer, or "external"."""
    if node.op != "call_function":
        return "output" if node.op == "output" else "input"
    packet = compat.packet(node)
    if packet in _WRITERS or packet is aten.copy_:
        return "writer"
    if not makes_storage:
        return "view"
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return "elementwise" if torch.Tag.pointwise in tags or packet in _ELEMENTWISE else "external"


def _arguments(output: fx.Node) -> Sequence[object]:
    (values,) = output.args
    assert isinstance(values, (tuple, list))
    return values


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]


def _nbytes(value: torch.Tensor) -> int:
    """Bytes that a value needs, at the sizes' hints: of its elements, each once where it is expanded."""
    elements = compat.hint(value.numel()) * value.dtype.itemsize
    return min(elements, compat.hint(value.untyped_storage().nbytes()))
