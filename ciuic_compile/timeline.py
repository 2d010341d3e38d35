"""What is alive at every step of a forward and a backward graph: the storages behind the simulated peak.

The walk is that of ``simulate.py``, with names; ``tests/test_timeline.py`` holds one against the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from . import compat, markers
from .analyze import MemoryModel
from .capture import owner, tensor
from .codecs.base import Size
from .identity import count_up
from .passes import Graphs
from .schedule import Schedule, output_nodes, written_over
from .simulate import Peaks, _results, _size, _Target, _temporaries, saved_storages, tensor_bytes
from .sources import source_of
from .types import Block, Line, Role, TensorClass, Timeline, Track

_PARTS = ("payload", "scale", "offset")


@dataclass
class LiveRange:
    """One storage of a graph, from the first to the last kernel at which it is alive; -1: before the first.

    ``inside``: it is the workspace of the node's call, not its result.
    """

    node: fx.Node
    nbytes: int
    first: int
    last: int
    inside: bool = False


def live_ranges(
    schedule: Schedule,
    live_inputs: Iterable[fx.Node],
    kind: str | None = None,
    channels_last: bool = False,
) -> list[LiveRange]:
    """The live ranges whose sum ``simulate`` takes the maximum of.

    Args:
        live_inputs: those that are alive until their last use; others are not counted.
        kind: type of device that every value counts as being on; None: what each is on.
        channels_last: whether Inductor runs the convolutions in that layout.
    """
    kernels, last_use, end = schedule.kernels, schedule.last_use, len(schedule.kernels)
    ranges: list[LiveRange] = []
    dying: dict[int, dict[fx.Node, tuple[Size, LiveRange]]] = {}
    hints: dict[Size, int] = {}  # bytes of dynamic sizes
    target = _Target(channels_last, kind)

    def live(node: fx.Node, size: Size, first: int, last: int) -> None:
        here = last if first <= last < end else end - 1
        ranges.append(LiveRange(node, _at_hints(size, hints), first, here))
        dying.setdefault(last, {})[node] = size, ranges[-1]

    for node in live_inputs:
        live(node, _size(node.meta.get("val"), hints), -1, last_use.get(node, 0))
    for now, kernel in enumerate(kernels):
        made = _results(schedule, now, hints)
        last = dying.get(now, {})
        sizes = {storage: size for storage, (size, _) in last.items()}
        for storage in written_over(kernel, schedule.stored, sizes, dict(made)):
            last[storage][1].last = now - 1
        for result, size in made:
            live(result, size, now, last_use.get(result, now))
        inside = _temporaries(kernel[0], target, hints)
        ranges.append(LiveRange(kernel[0], _at_hints(inside, hints), now, now, inside=True))
    return [r for r in ranges if r.nbytes]


def timeline(model: MemoryModel, planned: Graphs, baseline: Graphs, after: Peaks, before: Peaks) -> Timeline:
    """What is alive with a plan's graphs, and with Inductor's own partition.

    Args:
        model: that of the joint graph that ``planned`` was partitioned from.
        planned: with codecs as markers.
        baseline: partitioned from the user's own joint graph.
        after: what simulating ``planned`` came to.
        before: the same of ``baseline``.
    """
    lines: dict[Line, int] = {}
    first = _TrackMaker(model.original or model, baseline, lines).track(*before.schedules)
    second = _TrackMaker(model, planned, lines).track(*after.schedules)
    return Timeline(tuple(lines), first, second)


@dataclass(frozen=True)
class _Piece:
    """A live range counted in steps of the whole track; ``backward``: whether its node is in that graph."""

    node: fx.Node
    nbytes: int
    first: int
    last: int
    role: Role
    backward: bool


class _TrackMaker:
    """Joins the live ranges of a forward and a backward graph, and names them."""

    def __init__(self, model: MemoryModel, graphs: Graphs, lines: dict[Line, int]) -> None:
        self._model, self._graphs, self._lines = model, graphs, lines
        self._joint = {n.name: n for n in model.captured.graph.nodes}
        self._forward = {n.name for n in model.captured.savable}
        self._ids: dict[str, str] = {}  # of what the passes put into these graphs
        self._codecs: dict[str, tuple[str, str]] = {}  # encoded or decoded: codec, and of which joint node
        self._counted: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()

    def track(self, early: Schedule, late: Schedule) -> Track:
        """The track of the graphs, given the schedules of forward and backward."""
        forward, backward = self._graphs.forward.graph, self._graphs.backward.graph
        for graph in (forward, backward):
            self._name_codecs(graph)
        kind = self._model.kind
        channels_last = compat.prefers_channels_last(forward, kind)
        saved = {s.name: owner(s) for s in saved_storages(forward, self._graphs.num_fwd_outputs)}
        user = output_nodes(forward)[: self._graphs.num_fwd_outputs]
        outputs = dict.fromkeys(o for o in map(owner, user) if o.op != "placeholder")
        arriving = backward.find_nodes(op="placeholder")
        received = {n: saved[n.name] for n in arriving if n.name in saved and saved[n.name] not in outputs}
        made = live_ranges(early, (), kind, channels_last)
        used = live_ranges(late, received, kind, channels_last)
        start, end = len(early.kernels), len(early.kernels) + len(late.kernels)

        waiting = set(saved.values())
        pieces = []
        for r in made:
            role = Role.WORKSPACE if r.inside else Role.RETURNED if r.node in outputs else Role.TEMPORARY
            role = Role.SAVED if role is Role.TEMPORARY and r.node in waiting else role
            pieces.append(_Piece(r.node, r.nbytes, r.first, r.last, role, False))
        pieces += [_Piece(n, _bytes(n), start, end, Role.RETURNED, False) for n in outputs]
        tangents = [n for n in arriving if "tangents" in n.name]
        pieces += [_Piece(n, _bytes(n), start, end, Role.GRADIENT, True) for n in tangents]
        returned = {owner(n) for n in output_nodes(backward)}
        for r in used:
            first, last = start + 1 + r.first, start + 1 + r.last
            if r.node in received and not r.inside:
                pieces.append(_Piece(received[r.node], r.nbytes, first, last, Role.SAVED, False))
            else:
                role = Role.WORKSPACE if r.inside else self._role(r.node, returned)
                pieces.append(_Piece(r.node, r.nbytes, first, last, role, True))
        blocks = [self._block(p) for p in sorted(_joined(pieces), key=lambda p: p.first)]
        forward_steps = [self._id(kernel[0], False) for kernel in early.kernels]
        backward_steps = [self._id(kernel[0], True) for kernel in late.kernels]
        return Track((*forward_steps, "", *backward_steps), start, tuple(blocks))

    def _role(self, node: fx.Node, returned: set[fx.Node]) -> Role:
        if node in returned:
            return Role.GRADIENT
        if markers.is_marker(node, markers.decode):
            return Role.CODEC
        return (
            Role.RECOMPUTED if self._twin(node) is not None and node.name in self._forward else Role.TEMPORARY
        )

    def _block(self, piece: _Piece) -> Block:
        node, value = piece.node, tensor(piece.node)
        source = source_of(node)
        line = None
        if source.file:
            line = self._lines.setdefault(Line(source.file, source.line, source.code), len(self._lines))
        title = self._id(node, piece.backward)
        if piece.role is Role.WORKSPACE:
            title, value = f"{title}/workspace", None
        self._taken[title] += 1
        codec, base = self._codecs.get(node.name, (None, node.name))
        return Block(
            id=title if self._taken[title] == 1 else f"{title}~{self._taken[title]}",
            role=piece.role,
            kind=None if piece.role is Role.WORKSPACE else self._kind(self._joint.get(base)),
            module=source.module,
            line=line,
            dtype="" if value is None else str(value.dtype).removeprefix("torch."),
            shape=() if value is None else tuple(compat.hint(size) for size in value.shape),
            codec=codec,
            nbytes=piece.nbytes,
            first=piece.first,
            last=piece.last,
        )

    def _kind(self, node: fx.Node | None) -> TensorClass | None:
        if node is None or node.name not in self._forward or tensor(node) is None:
            return None
        return self._model.classes.storage_kind(node)

    def _twin(self, node: fx.Node) -> fx.Node | None:
        """The joint graph's node that this one is a copy of."""
        twin = self._joint.get(node.name)
        return twin if twin is not None and twin.target == node.target else None

    def _id(self, node: fx.Node, backward: bool) -> str:
        if self._twin(node) is not None and node.name not in self._ids:
            again = backward and node.op != "placeholder" and node.name in self._forward
            return self._model.ids[node.name] + ("@backward" if again else "")
        if node.name not in self._ids:
            self._ids |= count_up([(node, backward)], self._counted, "added/")
        return self._ids[node.name]

    def _name_codecs(self, graph: fx.Graph) -> None:
        """What is encoded is named after what it is the code of, and so is what is decoded."""
        for node in graph.nodes:
            if markers.is_marker(node, markers.encode):
                of, codec, _order = node.args
                assert isinstance(of, fx.Node)
                base = self._id(of, False)
                for part in filter(compat.is_getitem, node.users):
                    self._ids[part.name] = f"{base}/{_PARTS[part.args[1]]}"
                    self._codecs[part.name] = (str(codec), of.name)
            elif markers.is_marker(node, markers.decode):
                payload = node.args[0][0]
                assert isinstance(payload, fx.Node)
                self._codecs[node.name] = self._codecs[payload.name]
                self._ids[node.name] = self._ids[payload.name].removesuffix(_PARTS[0]) + "decoded"


def _joined(pieces: list[_Piece]) -> list[_Piece]:
    """Pieces of one storage that follow on one another, as one; without what has no bytes.

    The storage of a saved view that is smaller than what it is a view of stays in two: torch saves a copy.
    """
    whole: dict[fx.Node, int] = {}
    joined: list[_Piece] = []
    for piece in (p for p in pieces if p.nbytes):
        at = whole.get(piece.node)
        if at is not None and piece.role is not Role.WORKSPACE:
            before = joined[at]
            if (before.last + 1, before.nbytes) == (piece.first, piece.nbytes):
                joined[at] = replace(before, last=piece.last)
                continue
        if piece.role is not Role.WORKSPACE:
            whole[piece.node] = len(joined)
        joined.append(piece)
    return joined


def _at_hints(size: Size, hints: Mapping[Size, int]) -> int:
    return int(size) if isinstance(size, int) else hints[size]


def _bytes(node: fx.Node) -> int:
    return tensor_bytes(node.meta.get("val"))
