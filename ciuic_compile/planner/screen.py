"""Moves that cannot be worth anything, found for all at once: most of what greedy moves would try.

What is screened out is certainly of no use, so the moves that are made are the same as without. Left in
is all that is not seen at a glance: what storing a rebuilt value frees, say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .program import ABSENT, Problem
from .state import State

#: Candidates that change together, and what is chosen for them.
Move = tuple[tuple[int, ...], int]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

#: What is no cost beside that of a decision, as a share of it.
LEAST = 1e-9

#: A limit on the variance is broken for certain by this share of it: sums are kept up to date.
_ROUNDING = 1e-8


@dataclass(frozen=True, eq=False)
class Level:
    """Moves of one size, their members one after the other.

    Attributes:
        starts: where each move's members begin.
        choices: one a member.
    """

    moves: Sequence[Move]
    members: Ints
    starts: Ints
    choices: Ints

    @classmethod
    def of(cls, moves: Sequence[Move]) -> Level:
        """These moves."""
        counts = np.array([len(members) for members, _ in moves], dtype=np.int64)
        every = [v for members, _ in moves for v in members]
        choices = np.repeat(np.array([choice for _, choice in moves], dtype=np.int64), counts)
        return cls(moves, np.array(every, dtype=np.int64), np.cumsum(counts) - counts, choices)


class Screen:
    """What each choice of each candidate takes, as tables; ``ABSENT`` is their last column."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        width = 1 + max((len(c.stores) for c in problem.candidates), default=0)
        self._cost, self._variance = (np.zeros((len(problem.candidates), width)) for _ in range(2))
        self._nbytes = np.zeros((len(problem.candidates), width), dtype=np.int64)
        self._unpacked = np.zeros((len(problem.candidates), width), dtype=bool)
        for v, c in enumerate(problem.candidates):
            for k, store in enumerate(c.stores):
                self._cost[v, k] = problem.cost(store.time_us, store.variance)
                self._nbytes[v, k], self._variance[v, k] = store.nbytes, store.variance
                self._unpacked[v, k] = store.unpacked
            self._cost[v, ABSENT] = problem.cost(c.rebuild.time_us, 0.0) if c.rebuild else np.inf
        inputs = [(v, u) for u, readers in enumerate(problem.readers) for v in readers]
        self._rebuilt, self._inputs = np.array(inputs, dtype=np.int64).reshape(len(inputs), 2).T
        self._produced = np.array([c.produced for c in problem.candidates], dtype=np.int64)
        self._last_use = np.array([c.last_use for c in problem.candidates], dtype=np.int64)

    def hopeful(self, state: State, level: Level) -> list[int]:
        """Indices of the moves that may be worth something."""
        if not level.moves:
            return []
        now = _Now(self, state)
        members, choices = level.members, level.choices
        changed = now.decision[members] != choices
        more = np.where(changed, self._nbytes[members, choices] - now.nbytes[members], 0)
        noise = np.where(changed, self._variance[members, choices] - now.variance[members], 0.0)
        saved = np.add.reduceat(more, level.starts)
        variance = np.add.reduceat(noise, level.starts)
        if state.excess() > 0:
            lowers = changed & self._lowers(now, members, choices, more)
            return self._list(
                np.logical_or.reduceat(lowers, level.starts) | self._closer(state, saved, variance)
            )
        asked = np.where((choices == ABSENT) & ~now.needed[members], 0.0, self._cost[members, choices])
        cost = np.add.reduceat(np.where(changed, asked - now.saves[members], 0.0), level.starts)
        hopeful = (cost < 0) & self._within(state, saved, variance)
        if now.live is not None:
            single = np.diff(level.starts, append=len(members)) == 1
            alone = level.starts[single]  # others of a larger move may give back what one takes
            hopeful[single] &= (more[alone] <= 0) | ~self._breaks(now, members[alone], more[alone])
        return self._list(hopeful)

    def ranked(self, state: State, level: Level) -> list[tuple[float, int]]:
        """What moves that store the same in fewer bytes take off the steps over the budget, for their cost.

        Counted is what is carried alone, at each step no more than is over.

        Returns:
            pairs of that and the move's index, the best first.
        """
        budget = self.problem.budget
        if not level.moves or budget is None:
            return []
        now = _Now(self, state)
        assert now.live is not None
        beyond = np.maximum(now.live - budget, 0)
        steps, nbytes = (np.concatenate([[0], np.cumsum(each)]) for each in (beyond > 0, beyond))
        until = np.where(now.needed, now.first, self.problem.forward_steps)
        start = np.minimum(self._last_use + 1, until)
        members, choices = level.members, level.choices
        fewer = np.maximum(now.nbytes[members] - self._nbytes[members, choices], 0)
        off = np.minimum(
            fewer * (steps[until] - steps[start])[members], (nbytes[until] - nbytes[start])[members]
        )
        worth = np.add.reduceat(off, level.starts).astype(float)
        cost = np.add.reduceat(self._cost[members, choices] - now.saves[members], level.starts)
        stored = now.stored[members] & (choices != ABSENT)
        worth[~np.logical_and.reduceat(stored, level.starts)] = 0.0
        worth /= np.maximum(cost, LEAST * max(state.cost(), 1.0))
        best = np.argsort(-worth, kind="stable")
        return [(float(worth[i]), int(i)) for i in best[: int((worth > 0).sum())]]

    def _list(self, hopeful: Bools) -> list[int]:
        found: list[int] = np.flatnonzero(hopeful).tolist()
        return found

    def _within(self, state: State, saved: Ints, variance: Floats) -> Bools:
        """Which moves keep the limits on sums."""
        problem, within = self.problem, np.ones(len(saved), dtype=bool)
        if problem.max_saved is not None:
            within &= state.saved + saved <= problem.max_saved
        if problem.max_variance is not None:
            within &= state.variance + variance <= max(problem.max_variance, 1e-30) * (1 + _ROUNDING)
        return within

    def _closer(self, state: State, saved: Ints, variance: Floats) -> Bools:
        """Which moves take something off sums that are over their limits."""
        problem, closer = self.problem, np.zeros(len(saved), dtype=bool)
        if problem.max_saved is not None and state.saved > problem.max_saved:
            closer |= saved < 0
        if problem.max_variance is not None and state.variance > problem.max_variance:
            closer |= (variance < 0) | (saved < 0)  # an error too large counts as the saved bytes
        return closer

    def _lowers(self, now: _Now, members: Ints, choices: Ints, more: Ints) -> Bools:
        """Which changes may leave less alive at a step that is over the budget."""
        problem = self.problem
        if problem.budget is None or now.live is None:
            return np.zeros(len(members), dtype=bool)
        over = np.concatenate([[0], np.cumsum(now.live > problem.budget)])

        def any_over(start: Ints, stop: Ints) -> Bools:
            return np.asarray(over[np.maximum(stop + 1, start)] > over[start])

        until = np.maximum(now.last, problem.forward_steps - 1)
        whole = any_over(self._produced, until)
        ends = any_over(self._last_use, self._last_use) | (now.needed & any_over(now.first, now.last))
        carried = any_over(self._last_use, until)
        lowers = np.where(more < 0, carried[members], ends[members])
        lowers = np.where(choices == ABSENT, (whole | self._brings_forward(now, over))[members], lowers)
        return np.asarray(lowers | now.rebuilt[members])

    def _brings_forward(self, now: _Now, over: Ints) -> Bools:
        """Whose rebuilding may have another value decoded or rebuilt sooner, after which something goes."""
        first = np.minimum(now.first, self.problem.steps - 1)
        found = now.unpacked & now.needed & (over[first + 1] > over[first])
        earlier = over[first + 1] > over[self.problem.forward_steps]
        for v in np.flatnonzero(now.rebuilt).tolist():
            c = self.problem.candidates[v]
            inputs = c.rebuild.inputs if c.rebuild is not None else ()
            found[v] = (earlier[v] and not c.fused) or any(found[u] for u in inputs)
        brings = np.zeros(len(found), dtype=bool)
        brings[self._rebuilt[found[self._inputs]]] = True
        return brings

    def _breaks(self, now: _Now, members: Ints, more: Ints) -> Bools:
        """Which single candidates would be over the budget where nothing but their own bytes changes."""
        assert self.problem.budget is not None and now.live is not None
        start = self._last_use + 1
        stop = np.where(now.stored & now.needed, now.first, self.problem.forward_steps)
        return np.asarray(tops(now.live, start, stop)[members] + more > self.problem.budget)


class _Now:
    """A state as arrays, one entry a candidate."""

    def __init__(self, screen: Screen, state: State) -> None:
        problem = screen.problem
        self.decision = np.array(state.decision, dtype=np.int64)
        self.first, self.last = state.needs()
        self.needed, self.stored = self.last >= 0, self.decision != ABSENT
        self.rebuilt = self.needed & ~self.stored
        every = np.arange(len(self.decision))
        self.nbytes = screen._nbytes[every, self.decision]
        self.variance = screen._variance[every, self.decision]
        self.unpacked = screen._unpacked[every, self.decision]
        #: What not having it as it is may save at most: of a rebuilt value, all that it is rebuilt from too.
        self.saves = np.where(self.stored | self.needed, screen._cost[every, self.decision], 0.0)
        for v in np.flatnonzero(self.rebuilt).tolist():
            rebuild = problem.candidates[v].rebuild
            self.saves[v] += sum(self.saves[u] for u in rebuild.inputs if self.rebuilt[u]) if rebuild else 0.0
        self.live = state.live() if problem.budget is not None else None


def tops(values: Ints, starts: Ints, stops: Ints) -> Ints:
    """The most of each ``values[start:stop]``; as little as there is where that is empty."""
    found = np.full(len(starts), np.iinfo(np.int64).min // 2)
    lengths = stops - starts
    table, width = values, 1  # the most of each stretch of ``width``, which is a power of two
    while width <= len(values):
        here = (lengths >= width) & (lengths < 2 * width)
        found[here] = np.maximum(table[starts[here]], table[stops[here] - width])
        table, width = np.maximum(table[:-width], table[width:]), 2 * width
    return found
