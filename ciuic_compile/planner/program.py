"""The planning problem as plain data, and the exact simulator that is the only judge of a decision.

Time is a fixed schedule: steps ``0 .. forward_steps - 1`` are the forward, the rest the backward. A step
is atomic: whatever is alive at any moment of it counts for all of it, so a chain rebuilt at one step is
counted as if all of it were alive together. Sizes are bytes, times microseconds, variances relative
error variances (dimensionless). Nothing here knows torch.

What is alive when (all ranges include both ends; a *need* is a backward step that reads the value or a
rebuild that reads it):

========================  =====================================================================
produced, in the forward  ``size`` from ``produced`` to ``last_use``; fused ones only if stored
kept                      ``size`` on to its last need
encoded, ``unpacked``     ``nbytes`` from ``last_use`` to its first need, where it is decoded;
                          ``size`` from its first to its last need
encoded, otherwise        ``nbytes`` from ``last_use`` to its last need (decoded inside its readers)
stored, but not needed    as above, until the forward ends
rebuilt                   ``size`` from its first to its last need; it needs its inputs at its first
rebuilt, fused            nothing; it needs its inputs wherever it is needed
========================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum, isfinite
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: In a decision: the value does not outlive the forward. It is rebuilt if something needs it, else dropped.
ABSENT = -1

#: One number a candidate: the index into its ``stores``, or ``ABSENT``.
Decision = tuple[int, ...]


class Takes(NamedTuple):
    """What a candidate takes under a choice and its needs: changes of the live bytes at steps, and sums."""

    changes: tuple[tuple[int, int], ...]
    time_us: float
    variance: float
    saved: int
    missing: int


@dataclass(frozen=True)
class Store:
    """One way to carry a value from forward to backward.

    Attributes:
        nbytes: payload bytes, qparams included.
        time_us: microseconds that encoding and decoding add to a step.
        variance: what it adds to the relative variance of the gradients.
        codec: name of the codec; None keeps the value as it is (``nbytes`` is then the candidate's size).
        unpacked: decoding writes the value to memory; otherwise readers decode for themselves.
    """

    nbytes: int
    time_us: float = 0.0
    variance: float = 0.0
    codec: str | None = None
    unpacked: bool = False


@dataclass(frozen=True)
class Rebuild:
    """How to compute a value again in the backward.

    Attributes:
        time_us: microseconds it takes, once a step, however many readers it has.
        inputs: the candidates it reads; what is always there (parameters, graph inputs) is not listed.
    """

    time_us: float
    inputs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One storage to decide on.

    Attributes:
        size: bytes.
        produced: forward step that writes it.
        last_use: last forward step that reads it (``produced`` if none does).
        reads: backward steps that read it directly; empty if only rebuilds may want it.
        stores: ways to store it; may be empty if it can be rebuilt or nothing reads it.
        rebuild: how to compute it again, if it can be.
        fused: pointwise and fused into its readers, so that it takes memory only if it is stored.
        group: candidates with equal keys are the same tensor in identical layers (a hint, for speed).
    """

    name: str
    size: int
    produced: int
    last_use: int
    reads: tuple[int, ...] = ()
    stores: tuple[Store, ...] = ()
    rebuild: Rebuild | None = None
    fused: bool = False
    group: str | None = None


@dataclass(frozen=True)
class Problem:
    """What to decide, what it costs and what limits it.

    Attributes:
        base: bytes alive at each step whatever is decided.
        candidates: in an order in which rebuilds read only earlier ones.
        budget: most bytes alive at any step.
        max_saved: most bytes carried from forward to backward, ``fixed_saved`` included.
        max_variance: most relative variance of the gradients.
        fixed_saved: bytes carried over that are no decision.
        time_weight: cost of a microsecond.
        variance_weight: cost of a unit of variance.
    """

    forward_steps: int
    base: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    budget: int | None = None
    max_saved: int | None = None
    max_variance: float | None = None
    fixed_saved: int = 0
    time_weight: float = 1.0
    variance_weight: float = 0.0

    def __post_init__(self) -> None:
        steps, forward = len(self.base), self.forward_steps
        if not 0 <= forward <= steps:
            raise ValueError(f"{forward} forward steps of {steps}")
        if not (0 <= self.time_weight < np.inf and 0 <= self.variance_weight < np.inf):
            raise ValueError("weights must be finite and not negative")
        shapes: dict[str, tuple[int, bool, bool]] = {}
        for i, c in enumerate(self.candidates):
            where = f"candidate {i} ({c.name})"
            if c.size < 0 or not 0 <= c.produced <= c.last_use < forward:
                raise ValueError(f"{where}: size {c.size}, steps {c.produced}..{c.last_use} of {forward}")
            if any(not forward <= t < steps for t in c.reads):
                raise ValueError(f"{where}: reads outside the backward: {c.reads}")
            if c.rebuild is not None and any(not 0 <= u < i for u in c.rebuild.inputs):
                raise ValueError(f"{where}: rebuilt from later candidates: {c.rebuild.inputs}")
            costs = [c.rebuild.time_us] if c.rebuild else []
            for store in c.stores:
                costs += [store.time_us, store.variance, float(store.nbytes)]
                if store.codec is None and (store.nbytes != c.size or store.unpacked):
                    raise ValueError(f"{where}: kept as it is, it has its own size and is not unpacked")
            if not all(isfinite(x) and x >= 0 for x in costs):
                raise ValueError(f"{where}: costs and sizes must be finite and not negative")
            if c.group is not None:
                shape = (len(c.stores), c.rebuild is not None, bool(c.reads))
                if shapes.setdefault(c.group, shape) != shape:
                    raise ValueError(f"{where}: group {c.group!r} has members with other options")

    @property
    def steps(self) -> int:
        """Forward and backward steps."""
        return len(self.base)

    @property
    def choices(self) -> int:
        """Stores and rebuilds of all candidates."""
        return sum(len(c.stores) + (c.rebuild is not None) for c in self.candidates)

    def cost(self, time_us: float, variance: float) -> float:
        """What is minimised."""
        return self.time_weight * time_us + self.variance_weight * variance

    def within(self, budget: int | None) -> Problem:
        """The same under another budget; what is known of the candidates, whatever it is, stays known."""
        other = replace(self, budget=budget)
        vars(other).update(readers=self.readers, known=self.known)
        return other

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each candidate, those that may be rebuilt from it."""
        found: list[list[int]] = [[] for _ in self.candidates]
        for i, c in enumerate(self.candidates):
            for u in dict.fromkeys(c.rebuild.inputs) if c.rebuild else ():
                found[u].append(i)
        return tuple(map(tuple, found))

    @cached_property
    def known(self) -> dict[tuple[int, int, int, int], Takes]:
        """What :func:`takes` has said so far, by its arguments: searches ask for the same again and again."""
        return {}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a decision does, exactly.

    Attributes:
        cost: weighted sum of time and variance.
        saved_bytes: carried from forward to backward, ``fixed_saved`` included.
        live_bytes: at each step.
        peak_bytes: the most of them, first reached at ``peak_step``.
        rebuilt: candidates that are computed again.
        missing: candidates that something needs, though they are neither stored nor can be rebuilt.
        feasible: nothing is missing and every limit holds.
    """

    cost: float
    time_us: float
    variance: float
    saved_bytes: int
    live_bytes: NDArray[np.int64]
    peak_bytes: int
    peak_step: int
    rebuilt: tuple[int, ...]
    missing: tuple[int, ...]
    feasible: bool


def needs(problem: Problem, decision: Sequence[int]) -> tuple[list[int], list[int]]:
    """First and last need of every candidate (``steps`` and -1 where nothing needs it).

    The ends are enough: what lives, lives from the first to the last.
    """
    count = len(problem.candidates)
    first = [min(c.reads, default=problem.steps) for c in problem.candidates]
    last = [max(c.reads, default=-1) for c in problem.candidates]
    for v in reversed(range(count)):
        c = problem.candidates[v]
        if decision[v] != ABSENT or c.rebuild is None or last[v] < 0:
            continue
        until = last[v] if c.fused else first[v]
        for u in c.rebuild.inputs:
            first[u] = min(first[u], first[v])
            last[u] = max(last[u], until)
    return first, last


def spans(problem: Problem, v: int, choice: int, first: int, last: int) -> list[tuple[int, int, int]]:
    """When a candidate takes how much under a choice: bytes, first and last step of each stretch."""
    c, end = problem.candidates[v], problem.forward_steps - 1
    if choice == ABSENT:
        found = [] if c.fused else [(c.size, c.produced, c.last_use)]
        if last >= 0 and c.rebuild is not None and not c.fused:
            found.append((c.size, first, last))
        return found
    store = c.stores[choice]
    found = [(c.size, c.produced, c.last_use)]
    if store.unpacked and last >= 0:
        found += [(store.nbytes, c.last_use, first), (c.size, first, last)]
    else:
        found.append((store.nbytes, c.last_use + (store.codec is None), max(end, last)))
    return found


def takes(problem: Problem, v: int, choice: int, first: int, last: int) -> Takes:
    """All that a candidate takes under a choice."""
    candidate = problem.candidates[v]
    delta: dict[int, int] = {}
    for nbytes, start, stop in spans(problem, v, choice, first, last):
        delta[start] = delta.get(start, 0) + nbytes
        delta[stop + 1] = delta.get(stop + 1, 0) - nbytes
    changes = tuple((step, nbytes) for step, nbytes in delta.items() if nbytes)
    if choice != ABSENT:
        store = candidate.stores[choice]
        return Takes(changes, store.time_us, store.variance, store.nbytes, 0)
    if last < 0:
        return Takes(changes, 0.0, 0.0, 0, 0)
    if candidate.rebuild is None:
        return Takes(changes, 0.0, 0.0, 0, 1)
    return Takes(changes, candidate.rebuild.time_us, 0.0, 0, 0)


def live_at(problem: Problem, decision: Sequence[int], step: int) -> list[int]:
    """Bytes of each candidate at one step."""
    first, last = needs(problem, decision)
    return [
        sum(n for n, a, b in spans(problem, v, choice, first[v], last[v]) if a <= step <= b)
        for v, choice in enumerate(decision)
    ]


def evaluate(problem: Problem, decision: Sequence[int]) -> Evaluation:
    """Simulate the schedule under this decision."""
    if len(decision) != len(problem.candidates):
        raise ValueError(f"{len(decision)} choices for {len(problem.candidates)} candidates")
    first, last = needs(problem, decision)
    delta = [0] * (problem.steps + 1)
    times, variances = [], []
    saved, rebuilt, missing = problem.fixed_saved, [], []
    for v, (c, choice) in enumerate(zip(problem.candidates, decision, strict=True)):
        for nbytes, start, stop in spans(problem, v, choice, first[v], last[v]):
            delta[start] += nbytes
            delta[stop + 1] -= nbytes
        if choice != ABSENT:
            store = c.stores[choice]
            times.append(store.time_us)
            variances.append(store.variance)
            saved += store.nbytes
        elif last[v] >= 0 and c.rebuild is None:
            missing.append(v)
        elif last[v] >= 0:
            assert c.rebuild is not None
            rebuilt.append(v)
            times.append(c.rebuild.time_us)
    live = np.asarray(problem.base, dtype=np.int64) + np.cumsum(np.asarray(delta[:-1], dtype=np.int64))
    step = int(live.argmax()) if live.size else 0
    peak = int(live[step]) if live.size else 0
    time_us, variance = fsum(times), fsum(variances)
    feasible = (
        not missing
        and (problem.budget is None or peak <= problem.budget)
        and (problem.max_saved is None or saved <= problem.max_saved)
        and (problem.max_variance is None or variance <= problem.max_variance)
    )
    return Evaluation(
        cost=problem.cost(time_us, variance),
        time_us=time_us,
        variance=variance,
        saved_bytes=saved,
        live_bytes=live,
        peak_bytes=peak,
        peak_step=step,
        rebuilt=tuple(rebuilt),
        missing=tuple(missing),
        feasible=feasible,
    )


def tidy(problem: Problem, decision: Sequence[int]) -> Decision:
    """The decision without stores that nothing needs; it costs and takes no more than before."""
    _, last = needs(problem, decision)
    return tuple(ABSENT if last[v] < 0 else choice for v, choice in enumerate(decision))
