"""What is alive at the simulated peak of a graph: by node, size and line of the user's code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from ciuic_compile.capture import owner
from ciuic_compile.fusion import is_external
from ciuic_compile.passes import Graphs
from ciuic_compile.schedule import in_kernels, output_nodes, overwrites, stored_values
from ciuic_compile.simulate import _results, saved_storages, tensor_bytes


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


def alive_at_peak(graph: fx.Graph, inputs: Mapping[fx.Node, int]) -> AtPeak:
    """Walk the live ranges that ``simulate`` walks, and stop where they add up to the most.

    Args:
        inputs: saved tensors and their bytes, counted until their last use.
    """
    returned = {owner(n) for n in output_nodes(graph)}
    stored = stored_values(graph, returned)
    kernels = in_kernels(stored)
    step = {node: i for i, kernel in enumerate(kernels) for node in kernel}
    readers: dict[fx.Node, set[int]] = {}
    for node, storages in stored.items():
        for storage in storages:
            readers.setdefault(storage, set()).add(step[node])
    end = len(kernels)
    last = {s: max(steps) for s, steps in readers.items()} | dict.fromkeys(returned, end)
    live = {node: Alive(node, size, "saved") for node, size in inputs.items()}
    most, best = -1, AtPeak((), ())
    for now, kernel in enumerate(kernels):
        made = [
            Alive(result, size, "returned" if last.get(result) == end else "made")
            for node in kernel
            if not overwrites(node) and (node in returned or readers.get(node) != {now})  # else in registers
            for result, size in _results(node, {})
        ]
        dying = [node for node in live if last.get(node, 0) <= now]
        spare = Counter(() if is_external(kernel[0]) else (live[node].nbytes for node in dying))
        apart = []  # what takes no dying storage's place
        for item in made:
            spare[item.nbytes] -= 1
            if spare[item.nbytes] < 0:
                apart.append(item)
        total = sum(item.nbytes for item in (*live.values(), *apart))
        if total > most:
            there = sorted((*live.values(), *apart), key=lambda item: -item.nbytes)
            most, best = total, AtPeak(tuple(n.name for n in kernel), tuple(there))
        live |= {item.node: item for item in made}
        for node in (*dying, *(item.node for item in made if last.get(item.node, now) <= now)):
            del live[node]
    return best


def at_peaks(graphs: Graphs) -> dict[str, AtPeak]:
    """That of the forward and of the backward."""
    names = {n.name for n in saved_storages(graphs.forward.graph, graphs.num_fwd_outputs)}
    arriving = graphs.backward.graph.find_nodes(op="placeholder")
    inputs = {n: tensor_bytes(n.meta.get("val")) for n in arriving if n.name in names}
    return {
        "forward": alive_at_peak(graphs.forward.graph, {}),
        "backward": alive_at_peak(graphs.backward.graph, inputs),
    }
