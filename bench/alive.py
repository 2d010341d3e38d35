"""What is alive at the simulated peak of a graph: by node, size and line of the user's code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import fx

from ciuic_compile.capture import owner
from ciuic_compile.passes import Graphs
from ciuic_compile.schedule import Schedule, output_nodes
from ciuic_compile.simulate import Peaks, saved_storages, tensor_bytes
from ciuic_compile.timeline import LiveRange, live_ranges


@dataclass(frozen=True)
class Alive:
    """One storage at the peak; ``what`` it is to the graph: "saved", "made" or "returned"."""

    node: fx.Node
    nbytes: int
    what: str

    @property
    def line(self) -> str:
        """The user's line behind it, empty where there is none."""
        trace = (self.node.stack_trace or "").strip().splitlines()
        return trace[-1].strip() if trace else ""


@dataclass(frozen=True)
class AtPeak:
    """The kernel during which the most bytes are alive, and what they are; its own temporaries left out."""

    kernel: tuple[str, ...]
    alive: tuple[Alive, ...]

    @property
    def nbytes(self) -> int:
        """All of it."""
        return sum(a.nbytes for a in self.alive)

    def share(self, what: str) -> int:
        """Bytes of one kind."""
        return sum(a.nbytes for a in self.alive if a.what == what)


def alive_at_peak(graph: fx.Graph, schedule: Schedule, inputs: Mapping[fx.Node, int]) -> AtPeak:
    """Of the live ranges that ``simulate`` walks, those where they add up to the most.

    Args:
        schedule: that of the graph.
        inputs: saved tensors and their bytes, counted until their last use.
    """
    returned = {owner(n) for n in output_nodes(graph)}
    ranges = live_ranges(schedule, inputs)
    changes: Counter[int] = Counter()
    for r in ranges:
        changes[r.first] += r.nbytes
        changes[r.last + 1] -= r.nbytes
    totals = list(accumulate(changes[step] for step in range(-1, len(schedule.kernels))))[1:]
    now = totals.index(max(totals))

    def what(r: LiveRange) -> str:
        return "saved" if r.node in inputs else "returned" if r.node in returned else "made"

    there = [Alive(r.node, r.nbytes, what(r)) for r in ranges if r.first <= now <= r.last and not r.inside]
    return AtPeak(
        tuple(n.name for n in schedule.kernels[now]), tuple(sorted(there, key=lambda item: -item.nbytes))
    )


def at_peaks(graphs: Graphs, peaks: Peaks) -> dict[str, AtPeak]:
    """That of the forward and of the backward, as they were simulated."""
    early, late = peaks.schedules
    names = {n.name for n in saved_storages(graphs.forward.graph, graphs.num_fwd_outputs)}
    arriving = graphs.backward.graph.find_nodes(op="placeholder")
    inputs = {n: tensor_bytes(n.meta.get("val")) for n in arriving if n.name in names}
    return {
        "forward": alive_at_peak(graphs.forward.graph, early, {}),
        "backward": alive_at_peak(graphs.backward.graph, late, inputs),
    }
