"""Good decisions without a solver: greedy moves of identical layers together, judged by the simulator.

HiGHS proves bounds but finds little by itself where long chains may be rebuilt; this finds the usual answers
(checkpoint here, keep there, compress the rest) in a second, and HiGHS starts from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from .program import ABSENT, Decision, Problem
from .screen import LEAST, Level, Move, Screen
from .state import State

#: A move of a pass is made if it is still worth this share of what it was worth before the others.
_STILL_GOOD = 0.5

#: Estimates of what moves are worth are made again after so many in a row that were wrong.
_STALE = 32

#: What a move costs besides the candidates it touches: the sum over all steps.
_MEASURE = 4

#: Moves that are screened in the time in which one candidate is looked at.
_SCREENED = 50


@dataclass
class Effort:
    """How long to go on; several descents may share one.

    Attributes:
        work: candidates that may still be looked at, so that the answer is the same on every machine.
        late: whether time is up all the same.
    """

    work: int
    late: Callable[[], bool] = lambda: False

    def over(self) -> bool:
        """Whether to stop."""
        return self.work <= 0 or self.late()


#: Which moves: all of them, those of whole groups, those of single candidates.
ALL, GROUPS, SINGLES = slice(None), slice(1), slice(-1, None)


def descend(problem: Problem, start: Decision, effort: Effort, moves: slice = ALL) -> Decision:
    """The decision that greedy moves reach from ``start``: first within the limits, then cheaper.

    Args:
        start: a decision in which nothing is missing.
    """
    return _Descent(State(problem, start), effort).run(moves_of(problem)[moves])


class _Descent:
    def __init__(self, state: State, effort: Effort) -> None:
        self.state, self.effort, self.screen = state, effort, Screen(state.problem)

    def run(self, levels: Sequence[Sequence[Move]]) -> Decision:
        for moves in levels:
            level = Level.of(moves)
            while self._pass(level):
                pass
        return self.state.result()

    def _pass(self, level: Level) -> bool:
        """Make the moves that are worth most, the best first; False if none is."""
        self.effort.work -= len(level.moves) // _SCREENED
        if self.state.excess() > 0 and self._make(level, self.screen.ranked(self.state, level), _STALE):
            return True
        worth = []
        for index in self.screen.hopeful(self.state, level):
            if self.effort.over():
                return False
            if (gain := self._worth(level.moves[index])) > 0:
                worth.append((gain, index))
        return self._make(level, sorted(worth, key=lambda w: (-w[0], w[1])))

    def _make(self, level: Level, ranked: Sequence[tuple[float, int]], stale: float = inf) -> bool:
        """Make those moves, of these with their worths, that are still worth it.

        Args:
            stale: when so many in a row are not, what they are worth had better be asked again.
        """
        moved, failed = False, 0
        meets_limits = self.state.excess() == 0.0
        for worth, index in ranked:
            if self.effort.over() or failed >= stale:
                break
            if self._worth(level.moves[index], least=worth * _STILL_GOOD) > 0:
                moved, failed = True, 0
                if not meets_limits and self.state.excess() == 0.0:
                    break  # from here on another thing is wanted
            else:
                failed += 1
        return moved

    def _worth(self, move: Move, least: float | None = None) -> float:
        """What a move is worth: excess for its cost while there is any, else cost.

        Args:
            least: the move is made if it is worth so much; else it is only tried.
        """
        state = self.state
        before, over = state.cost(), state.excess()
        done = state.work
        undo = state.change(*move)
        if not undo.before:
            return 0.0
        self.effort.work -= state.work - done + _MEASURE
        cost, excess = state.cost(), state.excess()
        worth = 0.0
        if cost < inf:
            if over > 0:
                worth = (over - excess) / max(cost - before, LEAST * max(before, 1.0))
            elif excess == 0:
                worth = before - cost
                worth = worth if worth > LEAST * before else 0.0
        if least is None or worth < least or worth <= 0:
            state.undo(undo)
        return worth if least is None or worth >= least else 0.0


def moves_of(problem: Problem) -> list[list[Move]]:
    """Moves of whole groups, then of parts of them, then of one candidate."""
    groups: dict[str, list[int]] = {}
    for v, c in enumerate(problem.candidates):
        if c.rebuild is not None or len(c.stores) > 1:
            groups.setdefault(c.group or f"candidate {v}", []).append(v)
    return [
        [
            (tuple(part), choice)
            for members in groups.values()
            for part in parts(members)
            for choice in _choices(problem, members[0])
        ]
        for parts in (_whole, _parts, _single)
    ]


def _choices(problem: Problem, v: int) -> list[int]:
    c = problem.candidates[v]
    return [*range(len(c.stores)), *([ABSENT] if c.rebuild is not None else [])]


def _whole(members: list[int]) -> list[list[int]]:
    return [members]


def _parts(members: list[int]) -> list[list[int]]:
    """Stretches of a half, a quarter and an eighth of the layers, and every second and third layer."""
    count = len(members)
    parts = [members[::2], members[1::2], members[::3], members[2::3]]
    for pieces in (2, 4, 8):
        ends = [count * i // pieces for i in range(pieces + 1)]
        parts += [members[a:b] for a, b in pairwise(ends)]
    return [p for p in parts if 1 < len(p) < count]


def _single(members: list[int]) -> list[list[int]]:
    return [[v] for v in members]
