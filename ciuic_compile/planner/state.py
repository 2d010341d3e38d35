"""A decision that is changed and measured in place: what ``program.evaluate`` says, for less work.

A move changes few candidates; only they and what they are rebuilt from are looked at again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from math import inf

import numpy as np

from .program import ABSENT, Decision, Problem, needs, spans

#: A candidate and its choice, first and last need before a change.
Undo = list[tuple[int, int, int, int]]

#: A variance limit is exceeded by less than this share only through rounding, since sums are kept up to date.
_ROUNDING = 1e-9


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
        self._spans: dict[tuple[int, int, int, int], list[tuple[int, int, int]]] = {}
        self._excess: float | None = None
        self._delta = np.zeros(problem.steps + 1, dtype=np.int64)
        self._delta[:-1] = np.diff(np.asarray(problem.base, dtype=np.int64), prepend=0)
        self._time = self._variance = 0.0
        self._saved, self._missing = problem.fixed_saved, 0
        for v in range(len(self.decision)):
            self._count(v, 1)

    def result(self) -> Decision:
        """The decision as it is now."""
        return tuple(self.decision)

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
            live = np.cumsum(self._delta[:-1])
            excess += float(np.maximum(live - problem.budget, 0).sum())
        if problem.max_saved is not None:
            excess += max(0, self._saved - problem.max_saved)
        if problem.max_variance is not None:
            over = self._variance / max(problem.max_variance, 1e-30) - 1
            excess += over * max(1, self._saved) if over > _ROUNDING else 0.0
        return excess

    def change(self, members: Iterable[int], choice: int) -> Undo:
        """Choose this for these candidates; ``undo`` takes it back."""
        undo: Undo = []
        new = {v for v in members if self.decision[v] != choice}
        queue = sorted(-v for v in new)
        queued = set(new)
        while queue:  # readers first: they stand behind what they are rebuilt from
            v = -heappop(queue)
            self.work += 1
            before = self.decision[v], self._first[v], self._last[v]
            first, last = self._needs(v)
            chosen = choice if v in new else before[0]
            if (chosen, first, last) == before:
                continue
            undo.append((v, *before))
            self._set(v, chosen, first, last)
            if ABSENT in (before[0], chosen):
                for u in self._inputs[v]:
                    if u not in queued:
                        queued.add(u)
                        heappush(queue, -u)
        return undo

    def undo(self, undo: Undo) -> None:
        """Take a change back."""
        for v, choice, first, last in undo:
            self._set(v, choice, first, last)

    def _needs(self, v: int) -> tuple[int, int]:
        first, last = self._reads[v]
        for w in self._rebuilders[v]:
            if self.decision[w] == ABSENT and self._last[w] >= 0:
                start = self._first[w]
                until = self._last[w] if self._fused[w] else start
                first = start if start < first else first
                last = until if until > last else last
        return first, last

    def _set(self, v: int, choice: int, first: int, last: int) -> None:
        self._count(v, -1)
        self.decision[v], self._first[v], self._last[v] = choice, first, last
        self._count(v, 1)

    def _count(self, v: int, sign: int) -> None:
        """Add (or take away) all that a candidate takes."""
        candidate, choice, last = self.problem.candidates[v], self.decision[v], self._last[v]
        key = (v, choice, self._first[v], last)
        if key not in self._spans:
            self._spans[key] = spans(self.problem, *key)
        self._excess = None
        for nbytes, start, stop in self._spans[key]:
            self._delta[start] += sign * nbytes
            self._delta[stop + 1] -= sign * nbytes
        if choice != ABSENT:
            store = candidate.stores[choice]
            self._time += sign * store.time_us
            self._variance += sign * store.variance
            self._saved += sign * store.nbytes
        elif last >= 0:
            if candidate.rebuild is None:
                self._missing += sign
            else:
                self._time += sign * candidate.rebuild.time_us
