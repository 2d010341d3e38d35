"""A decision that is changed and measured in place: what ``program.evaluate`` says, for less work.

A move changes few candidates; only they and what they are rebuilt from are looked at again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .program import ABSENT, Decision, Problem, Takes, needs, takes

#: A variance limit is exceeded by less than this share only through rounding, since sums are kept up to date.
_ROUNDING = 1e-9


class Undo(NamedTuple):
    """What a change found: candidates with choice, first and last need and what they took; and the sums."""

    before: list[tuple[int, int, int, int, Takes]]
    sums: tuple[float, float, int, int, float | None]


class State:
    """A decision, when each value is needed under it, and what it takes.

    Attributes:
        decision: one choice a candidate.
        work: candidates looked at so far; the same on every machine.
    """

    def __init__(self, problem: Problem, decision: Sequence[int]) -> None:
        self.problem = problem
        self.decision = list(decision)
        self.work = 0
        self._first, self._last = needs(problem, decision)
        self._reads = [
            (min(c.reads, default=problem.steps), max(c.reads, default=-1)) for c in problem.candidates
        ]
        self._inputs = [c.rebuild.inputs if c.rebuild else () for c in problem.candidates]
        self._fused = [c.fused for c in problem.candidates]
        self._rebuilders = [
            tuple(w for w in readers if problem.candidates[w].rebuild is not None)
            for readers in problem.readers
        ]
        self._known = problem.known
        self._excess: float | None = None
        # An array is quick to change one by one; NumPy sees the same memory, to add it up.
        self._delta = array("q", np.diff(np.asarray(problem.base, dtype=np.int64), prepend=0).tolist())
        self._delta.append(0)
        self._deltas = np.frombuffer(self._delta, dtype=np.int64)[:-1]
        self._time = self._variance = 0.0
        self._saved, self._missing = problem.fixed_saved, 0
        self._takes = [
            self._taken(v, choice, self._first[v], self._last[v]) for v, choice in enumerate(self.decision)
        ]
        for each in self._takes:
            for step, nbytes in each.changes:
                self._delta[step] += nbytes
            self._add(each)

    def result(self) -> Decision:
        """The decision as it is now."""
        return tuple(self.decision)

    @property
    def saved(self) -> int:
        """Bytes carried from forward to backward."""
        return self._saved

    @property
    def variance(self) -> float:
        """Relative variance of the gradients."""
        return self._variance

    def needs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and last need of each candidate, as ``program.needs`` says."""
        return np.array(self._first, dtype=np.int64), np.array(self._last, dtype=np.int64)

    def live(self) -> NDArray[np.int64]:
        """Bytes alive at each step."""
        return np.cumsum(self._deltas)

    def cost(self) -> float:
        """Weighted time and variance; infinite where something needed is neither stored nor rebuilt."""
        return inf if self._missing else self.problem.cost(self._time, self._variance)

    def excess(self) -> float:
        """Bytes over the limits, summed over steps; 0.0 within them.

        An error over its limit counts as the saved bytes, as often as it is too large.
        """
        if self._excess is None:
            self._excess = self._measured()
        return self._excess

    def _measured(self) -> float:
        problem, excess = self.problem, 0.0
        if problem.budget is not None:
            excess += float(np.maximum(self.live() - problem.budget, 0).sum())
        if problem.max_saved is not None:
            excess += max(0, self._saved - problem.max_saved)
        if problem.max_variance is not None:
            over = self._variance / max(problem.max_variance, 1e-30) - 1
            excess += over * max(1, self._saved) if over > _ROUNDING else 0.0
        return excess

    def change(self, members: Iterable[int], choice: int) -> Undo:
        """Choose this for these candidates; ``undo`` takes it back."""
        undo = Undo([], (self._time, self._variance, self._saved, self._missing, self._excess))
        decision, firsts, lasts = self.decision, self._first, self._last
        new = {v for v in members if decision[v] != choice}
        queue = sorted(-v for v in new)
        queued = set(new)
        while queue:  # readers first: they stand behind what they are rebuilt from
            v = -heappop(queue)
            self.work += 1
            was = decision[v]
            first, last = self._needs(v)
            chosen = choice if v in new else was
            if chosen == was and first == firsts[v] and last == lasts[v]:
                continue
            before, now = self._takes[v], self._taken(v, chosen, first, last)
            undo.before.append((v, was, firsts[v], lasts[v], before))
            self._set(v, chosen, first, last, before, now)
            self._time -= before.time_us
            self._variance -= before.variance
            self._saved -= before.saved
            self._missing -= before.missing
            self._add(now)
            if was == ABSENT or chosen == ABSENT:
                for u in self._inputs[v]:
                    if u not in queued:
                        queued.add(u)
                        heappush(queue, -u)
        if undo.before:
            self._excess = None
        return undo

    def undo(self, undo: Undo) -> None:
        """Take the last change back."""
        for v, choice, first, last, before in undo.before:
            self._set(v, choice, first, last, self._takes[v], before)
        self._time, self._variance, self._saved, self._missing, self._excess = undo.sums

    def _needs(self, v: int) -> tuple[int, int]:
        first, last = self._reads[v]
        for w in self._rebuilders[v]:
            if self.decision[w] == ABSENT and self._last[w] >= 0:
                start = self._first[w]
                until = self._last[w] if self._fused[w] else start
                first = start if start < first else first
                last = until if until > last else last
        return first, last

    def _set(self, v: int, choice: int, first: int, last: int, before: Takes, now: Takes) -> None:
        """Make it so, but for the sums."""
        self.decision[v], self._first[v], self._last[v] = choice, first, last
        self._takes[v] = now
        delta = self._delta
        for step, nbytes in before.changes:
            delta[step] -= nbytes
        for step, nbytes in now.changes:
            delta[step] += nbytes

    def _add(self, now: Takes) -> None:
        self._time += now.time_us
        self._variance += now.variance
        self._saved += now.saved
        self._missing += now.missing

    def _taken(self, v: int, choice: int, first: int, last: int) -> Takes:
        """All that a candidate takes."""
        key = (v, choice, first, last)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = takes(self.problem, *key)
        return known
