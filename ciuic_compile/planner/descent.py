"""Good decisions without a solver: greedy moves of identical layers together, judged by the simulator.

HiGHS proves bounds but finds little by itself where long chains may be rebuilt; this finds the usual answers
(checkpoint here, keep there, compress the rest) in a second, and HiGHS starts from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .program import ABSENT, Decision, Evaluation, Problem, evaluate

#: Candidates that change together, and what is chosen for them.
Move = tuple[tuple[int, ...], int]
_NOTHING = 1e-9


@dataclass(frozen=True)
class _Point:
    decision: Decision
    cost: float
    excess: float  # bytes over the limits, summed over steps

    def better(self, other: _Point) -> bool:
        return (self.excess, self.cost) < (other.excess, other.cost)


def descend(problem: Problem, start: Decision, over: Callable[[], bool]) -> Decision:
    """The decision that greedy moves reach from ``start``: first within the limits, then cheaper.

    Args:
        start: a decision in which nothing is missing.
        over: whether time is up.
    """
    point = _at(problem, tuple(start))
    assert point is not None, "the start stores or rebuilds everything that is needed"
    for moves in _levels(problem):
        while not over():
            found = _step(problem, point, moves, over)
            if found is None:
                break
            point = found
    return point.decision


def _step(problem: Problem, point: _Point, moves: Sequence[Move], over: Callable[[], bool]) -> _Point | None:
    """The best of the moves: most excess for its cost while there is any, else the most cost."""
    best, merit = None, 0.0
    for members, choice in moves:
        if over():
            break
        changed = list(point.decision)
        for v in members:
            changed[v] = choice
        if tuple(changed) == point.decision:
            continue
        found = _at(problem, tuple(changed))
        if found is None:
            continue
        if point.excess > 0:
            gain = point.excess - found.excess
            worth = gain / max(found.cost - point.cost, _NOTHING) if gain > 0 else 0.0
        else:
            worth = point.cost - found.cost if found.excess == 0 else 0.0
        if worth > merit * (1 + _NOTHING):
            best, merit = found, worth
    return best


def _at(problem: Problem, decision: Decision) -> _Point | None:
    found = evaluate(problem, decision)
    return None if found.missing else _Point(decision, found.cost, _excess(problem, found))


def _excess(problem: Problem, found: Evaluation) -> float:
    excess = 0.0
    if problem.budget is not None:
        excess += float(np.maximum(found.live_bytes - problem.budget, 0).sum())
    if problem.max_saved is not None:
        excess += max(0, found.saved_bytes - problem.max_saved)
    if problem.max_variance is not None and found.variance > problem.max_variance:
        excess += (found.variance / max(problem.max_variance, 1e-30) - 1) * max(1, found.saved_bytes)
    return excess


def _levels(problem: Problem) -> Iterator[list[Move]]:
    """Moves of whole groups, then of parts of them, then of one candidate."""
    groups: dict[str, list[int]] = {}
    for v, c in enumerate(problem.candidates):
        if c.rebuild is not None or len(c.stores) > 1:
            groups.setdefault(c.group or f"candidate {v}", []).append(v)
    for parts in (_whole, _parts, _single):
        yield [
            (tuple(part), choice)
            for members in groups.values()
            for part in parts(members)
            for choice in _choices(problem, members[0])
        ]


def _choices(problem: Problem, v: int) -> list[int]:
    c = problem.candidates[v]
    return [*range(len(c.stores)), *([ABSENT] if c.rebuild is not None else [])]


def _whole(members: list[int]) -> list[list[int]]:
    return [members]


def _parts(members: list[int]) -> list[list[int]]:
    half = len(members) // 2
    parts = (members[:half], members[half:], members[::2], members[1::2], members[::3], members[2::3])
    return [p for p in parts if p and len(p) < len(members)]


def _single(members: list[int]) -> list[list[int]]:
    return [[v] for v in members]
