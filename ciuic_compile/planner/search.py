"""One branch-and-cut search: the best decision by one measure, with a bound that holds.

``solve.py`` says how it is used; ``relaxation.py`` holds the rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import fsum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint

from .descent import ALL, GROUPS, SINGLES, Effort, descend
from .highs import quiet_milp, relaxed
from .program import ABSENT, Decision, Evaluation, Problem, evaluate, tidy
from .relaxation import Relaxation, Rows, Table

Metric = Literal["cost", "peak", "saved", "variance", "any"]
Floats = NDArray[np.float64]

#: Gaps below this are HiGHS's tolerances.
EXACT = 1e-6

#: What the best cost so far is scaled to, so that HiGHS's absolute gap of 1e-6 is far below EXACT.
_SCALE = 1e4

#: Share of the cost that all ties together may weigh: variance first, then bytes.
_TIES = (2e-7, 2e-8)

#: A problem of more 0/1 columns than this is large: relaxed before it is solved as it is.
_SMALL = 400

#: Shares of the time for greedy moves, counted in work: at first, and to mend what a relaxation is rounded to
#: (0.1 left a plan 12% dearer, 48 layers). How much of what is left the clock allows them.
_GREEDY, _MEND, _GUARD = 0.5, 0.3, 0.8

#: Budgets tried for the smallest peak, each halfway between what was and what was not reached.
_HALVINGS = 6

#: Candidates that greedy moves look at in a second: half of what two shared cores (x86-64) did.
_WORK_PER_SECOND = 1e5

#: HiGHS's seconds for the root of a large integer program, an element of its matrix, zeros included, as
#: transformers of 48 layers took; nodes that take as long again; the share of the time that may go into both.
_SECONDS_A_CELL, _NODES, _INTEGER = 1.2e-8, 50, 0.05

#: Relaxations solved of a large problem, and by how much one must bring the gap down for another.
_RELAXATIONS, _PROGRESS = 8, 1e-3

#: Peak rows added at a time.
_ROWS = 12


class Clock:
    """Seconds since it was made, and how many of its allowance are left."""

    def __init__(self, seconds: float) -> None:
        self._start, self._seconds = time.perf_counter(), seconds

    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._seconds - self.elapsed())

    def over(self) -> bool:
        """Whether nothing is left."""
        return self.left() <= 0.0


class Search:
    """Minimise one measure of a decision within the problem's limits.

    Args:
        metric: "any" stops at the first decision within the limits.
        gap: relative gap at which to stop.
        starts: decisions that the answer is no worse than.
        seconds: what is tried is counted in work, as much as should fit in them.
        warm: where greedy moves begin; by default at the cheapest choices, whatever they take.
        patience: seconds after which the clock ends it, if more than those.
        bound: what is known before.

    Attributes:
        best: the best decision within the limits so far, with its evaluation.
        bound: no such decision has a smaller measure.
        slopes: bounds, by how much each falls at most with every byte more of budget, and the best measure
            then, which they never exceed.
        infeasible: there is none, proved.
        struck: the deadline ended something; another run may find something else.
    """

    def __init__(
        self,
        problem: Problem,
        metric: Metric,
        seconds: float,
        gap: float,
        starts: Sequence[Decision] = (),
        warm: Decision | None = None,
        patience: float = 0.0,
        bound: float = 0.0,
    ) -> None:
        self.problem, self.metric, self.starts, self.warm = problem, metric, starts, warm
        self.more, self.large = Table(), problem.choices > _SMALL
        self.clock, self.allowed = Clock(max(seconds, patience)), seconds
        self.struck = False
        self.expected = 0.0
        self.target = max(gap, EXACT)
        self.best: tuple[Decision, Evaluation] | None = None
        self.bound = bound
        self.slopes: list[tuple[float, float, float]] = []
        self.infeasible = False
        self.rounds = 0

    def value(self, evaluation: Evaluation) -> float:
        """The measure."""
        if self.metric == "peak":
            return float(evaluation.peak_bytes)
        if self.metric == "saved":
            return float(evaluation.saved_bytes)
        if self.metric == "variance":
            return evaluation.variance
        return evaluation.cost if self.metric == "cost" else 0.0

    def gap(self) -> float:
        """Relative distance of the best from the bound; 1.0 without one."""
        if self.best is None:
            return 1.0
        value = self.value(self.best[1])
        return max(0.0, (value - self.bound) / value) if value > 0 else 0.0

    def run(self, enough: float = 0.0) -> None:
        """Search until the gap is closed, nothing can be found, or time is up.

        Args:
            enough: a gap that is good enough for what greedy moves find in a large problem.
        """
        self.seed()
        if self._done_early() or (self.large and self.best is not None and self.gap() <= enough):
            return
        self._build()
        if self.large:
            self._relax()
            if self.best is not None and EXACT < self.target >= self.gap():
                return
        self._exact()

    def _late(self) -> bool:
        """Whether time is up, though there would be more to do."""
        self.struck |= self.clock.over()
        return self.clock.over()

    def _done_early(self) -> bool:
        return self.metric == "any" and self.best is not None

    # -- decisions

    def offer(self, decision: Decision) -> Evaluation:
        """Evaluate a decision and keep it if it is the best so far."""
        decision = tidy(self.problem, decision)
        found = evaluate(self.problem, decision)
        if found.feasible and (self.best is None or self._better(found, self.best[1])):
            self.best = decision, found
        return found

    def _better(self, a: Evaluation, b: Evaluation) -> bool:
        x, y = self.value(a), self.value(b)
        if abs(x - y) > 1e-12 * max(x, y):
            return x < y
        return (a.variance, a.saved_bytes) < (b.variance, b.saved_bytes)

    def seed(self) -> None:
        """Decisions that need no solver: the cheapest and the smallest choices."""
        for decision in self.starts:
            self.offer(decision)
        cheap, small, rebuilt = [], [], list[int]()
        for c in self.problem.candidates:
            order = range(len(c.stores))
            cost = [self.problem.cost(s.time_us, s.variance) for s in c.stores]
            cheap.append(min(order, key=lambda k: (cost[k], c.stores[k].nbytes), default=ABSENT))
            small.append(min(order, key=lambda k: (c.stores[k].nbytes, cost[k]), default=ABSENT))
            rebuilt.append(ABSENT if c.rebuild else small[-1])
        self.cheapest = tuple(cheap)
        for choices in (self.cheapest, tuple(small), tuple(rebuilt)):
            self.offer(choices)
        if self.clock.over() or evaluate(self.problem, self.cheapest).missing:
            return
        if self.warm is not None and self.metric == "cost":
            near = descend(self.problem, self.warm, self._effort(_GREEDY), SINGLES)
            if self.offer(near).feasible:
                return
        self._descend(self.best[0] if self.best and self.metric == "peak" else self.cheapest)

    def _descend(self, start: Decision) -> None:
        """What greedy moves find; for the smallest peak, under one budget after the other."""
        effort = self._effort(_GREEDY)
        if self.metric in ("cost", "any"):
            later = self.large and self.warm is None  # it is relaxed next, and single moves mend that
            self.offer(descend(self.problem, start, effort, GROUPS if later else ALL))
        if self.metric != "peak" or not self.problem.base:
            return
        high = evaluate(self.problem, start).peak_bytes
        for moves in (GROUPS, ALL):
            low = max(self.problem.base)
            for _ in range(_HALVINGS):
                if effort.over():
                    return
                budget = (low + high) // 2
                found = descend(self.problem.within(budget), start, effort, moves)
                peak = self.offer(found).peak_bytes
                if peak < high:
                    high, start = peak, found
                if peak > budget:
                    low = budget

    def _effort(self, share: float) -> Effort:
        left = Clock(_GUARD * self.clock.left())

        def late() -> bool:
            self.struck |= left.over()
            return left.over()

        return Effort(int(_WORK_PER_SECOND * share * self.allowed), late)

    # -- the program

    def _build(self) -> None:
        problem = self.problem
        peak = self.metric == "peak"
        unit = max(1, self.best[1].peak_bytes if self.best else sum(c.size for c in problem.candidates))
        self.relaxation = relaxation = Relaxation(problem, peak, unit)
        stores = [
            problem.candidates[v].stores[k] if k != ABSENT else None
            for v, k in zip(relaxation.owner, relaxation.choice, strict=True)
        ]
        rebuilds = [problem.candidates[v].rebuild for v in relaxation.owner]
        self.saved = np.array([float(s.nbytes) if s else 0.0 for s in stores])
        self.variance = np.array([s.variance if s else 0.0 for s in stores])
        times = np.array(
            [s.time_us if s else r.time_us if r else 0.0 for s, r in zip(stores, rebuilds, strict=True)]
        )
        if self.metric == "cost":
            self.costs = problem.time_weight * times + problem.variance_weight * self.variance
        elif self.metric in ("saved", "variance"):
            self.costs = self.saved if self.metric == "saved" else self.variance
        else:
            self.costs = np.zeros(relaxation.binaries)
        self.offset = float(problem.fixed_saved) if self.metric == "saved" else 0.0
        self.upper = np.ones(relaxation.binaries)
        self.lower = np.zeros(relaxation.binaries)
        for v, r in enumerate(relaxation.ranges):
            if r is None:
                self.upper[relaxation.present(v)] = 0.0
        if problem.max_saved is not None:
            room = problem.max_saved - problem.fixed_saved
            self.infeasible |= room < 0
            self._limit(self.saved, float(max(room, 0)))
        if problem.max_variance is not None:
            self.infeasible |= problem.max_variance < 0
            self._limit(self.variance, max(problem.max_variance, 0.0))
        if problem.budget is not None and relaxation.constant.size:
            self.infeasible |= bool(relaxation.constant.max() > problem.budget)
        if peak and relaxation.constant.size:
            relaxation.add_peak(int(relaxation.constant.argmax()))

    def _limit(self, coefficients: Floats, bound: float) -> None:
        """Add ``coefficients @ binaries <= bound`` (both not negative), scaled to a right side of 1."""
        scaled = np.minimum(coefficients / bound, 2.0) if bound > 0 else (coefficients > 0).astype(float)
        used = np.flatnonzero(scaled)
        self.more.add(dict(zip(used.tolist(), scaled[used].tolist(), strict=True)), -np.inf, float(bound > 0))

    def _forbid(self, ones: Sequence[int], zeros: Sequence[int] = ()) -> None:
        """Cut off every point in which all of ``ones`` are 1 and all of ``zeros`` are 0."""
        self.more.add(dict.fromkeys(ones, 1.0) | dict.fromkeys(zeros, -1.0), -np.inf, len(ones) - 1.0)

    def _objective(self) -> tuple[Floats, float, float]:
        """Scaled objective of all columns, its scale, and by how much ties may raise the unscaled value."""
        binaries = self.relaxation.binaries
        objective = np.zeros(self.relaxation.columns)
        if self.metric == "peak":
            objective[self.relaxation.peak_column] = _SCALE
            return objective, self.relaxation.unit / _SCALE, 0.0
        if self.metric == "any":
            return objective, 1.0, 0.0
        value = self.value(self.best[1]) - self.offset if self.best else float(self.costs.max(initial=0.0))
        ties = np.zeros(binaries)
        if self.metric == "cost":
            for column, weight in zip((self.variance, self.saved), _TIES, strict=True):
                total = float(sum(column[c].max() for c in self.relaxation.stores if c))
                ties += column * (weight / total if total > 0 else 0.0)
        if value <= 0:  # what costs anything is out: only ties are left to decide
            objective[:binaries] = ties * (_SCALE / _TIES[0])
            return objective, 0.0, 0.0
        objective[:binaries] = (self.costs / value + ties) * _SCALE
        return objective, value / _SCALE, value * sum(_TIES)

    def _capped(self) -> tuple[Floats, Floats]:
        """Bounds of all columns; what alone costs more than the best so far is left out."""
        extra = self.relaxation.columns - self.relaxation.binaries
        lower = np.concatenate([self.lower, np.zeros(extra)])
        upper = np.concatenate([self.upper, np.ones(extra)])
        if self.relaxation.peak_column >= 0:
            upper[self.relaxation.peak_column] = np.inf
        elif self.best is not None:
            most = self.value(self.best[1]) - self.offset
            upper[: self.relaxation.binaries][self.costs > most * (1 + 1e-9)] = 0.0
            lower = np.minimum(lower, upper)
        return lower, upper

    def _exact(self) -> None:
        """Rounds of integer programs until the gap is closed."""
        while not self.infeasible and not self._late():
            solved = self._round()
            if solved is None:
                return
            if self.metric == "any" and self.best is not None:
                return

    def _round(self, linear: bool = False) -> bool | None:
        """Solve the rows so far once; None when there is no more to do.

        Args:
            linear: columns between 0 and 1; its answer is rounded, and is only good for greedy moves to mend.
        """
        rows = self.relaxation.rows(self.problem.budget, self.more)
        objective, scale, ties = self._objective()
        self.rounds += 1
        if self.relaxation.columns == 0:
            self.offer(())
            self.infeasible = self.best is None
            return None
        solver = self._relaxed if linear else self._integral
        result = solver(rows, objective)
        if result is None:
            return None
        before = self.best
        self.struck |= result.status == 1
        optimum = result.fun if result.status == 0 else None  # what the clock stopped is no bound
        self._learn(result.status, optimum if linear else result.mip_dual_bound, scale, ties)
        if linear and optimum is not None:
            most = self.value(before[1]) if before else np.inf
            self.slopes.append((optimum * scale - ties + self.offset, scale * result.falls, most))
        if result.x is None:
            return None
        raw = self.relaxation.decision(result.x)
        found = self.offer(raw)
        if self.metric == "cost" and not found.feasible and not found.missing:
            self.offer(descend(self.problem, tidy(self.problem, raw), self._effort(_MEND), SINGLES))
        if self.gap() <= self.target and self.best is not None:
            return None
        if self._separate(tidy(self.problem, raw), result.x, found, rounded=linear):
            return True
        # Optimal for HiGHS and yet a gap: the costs were scaled to a worse answer; scale to this one.
        return True if result.status == 0 and not linear and self.best is not before else None

    def _relaxed(self, rows: Rows, objective: Floats) -> Any:
        return relaxed(objective, *self._capped(), rows, self.clock.left())

    def _integral(self, rows: Rows, objective: Floats) -> Any:
        """Solve with 0/1 columns; None where not even a large problem's root is likely to end in time.

        How many of its nodes are is counted by its size; the clock only guards.
        """
        options = {
            "mip_rel_gap": 0.0 if self.target <= EXACT else self.target / 2,
            "time_limit": self.clock.left(),
        }
        root = _SECONDS_A_CELL * rows.matrix.shape[0] * rows.matrix.shape[1]
        if self.large:
            left = _INTEGER * self.allowed - self.expected
            if root > left:
                return None
            options["node_limit"] = 1 + int(_NODES * (left / root - 1))
        integral = np.zeros(self.relaxation.columns)
        integral[: self.relaxation.binaries] = 1
        constraints = LinearConstraint(rows.matrix, rows.low, rows.high)
        result = quiet_milp(
            objective,
            integrality=integral,
            bounds=Bounds(*self._capped()),
            constraints=constraints,
            options=options,
        )
        self.expected += root * (1 + (result.mip_node_count or 0) / _NODES)
        return result

    def _learn(self, status: int, dual: float | None, scale: float, ties: float) -> None:
        """Raise the bound by what HiGHS proved."""
        if status == 2:
            if self.best is None:
                self.infeasible = True
                self.bound = np.inf
            else:
                self.bound = max(self.bound, self.value(self.best[1]))
        elif dual is not None and np.isfinite(dual):
            proved = dual * scale - ties + self.offset
            if self.best is not None:  # what cannot beat the best was left out
                proved = min(proved, self.value(self.best[1]))
            self.bound = max(self.bound, proved)

    # -- rows for what the simulator rejects

    def _separate(self, decision: Decision, x: Floats, found: Evaluation, rounded: bool = False) -> bool:
        """Add rows that this point breaks; False if it breaks none that could be added."""
        relaxation, problem = self.relaxation, self.problem
        limit = np.inf if problem.budget is None else float(problem.budget)
        if self.metric == "peak":
            limit = float(x[relaxation.peak_column]) * relaxation.unit * (1 + EXACT)
        if rounded:
            over = relaxation.lacking(_worst(relaxation.static_live(x), limit * (1 + EXACT)))
            for t in over:
                relaxation.add_peak(t)
            return bool(over)
        added = [relaxation.add_peak(t, decision) for t in _worst(found.live_bytes, limit)]
        if any(added):
            return True
        if found.feasible:
            return False
        self._cut(x, found)
        return True

    def _cut(self, x: Floats, found: Evaluation) -> None:
        """Cut off what HiGHS accepts within its tolerance, though it is over a limit."""
        problem, relaxation = self.problem, self.relaxation
        chosen = [c for c in range(relaxation.binaries) if x[c] > 0.5]
        covers: list[tuple[Floats, float]] = []
        if problem.max_saved is not None and found.saved_bytes > problem.max_saved:
            covers.append((self.saved, float(problem.max_saved - problem.fixed_saved)))
        if problem.max_variance is not None and found.variance > problem.max_variance:
            covers.append((self.variance, problem.max_variance))
        if problem.budget is not None and found.peak_bytes > problem.budget:
            room = float(problem.budget - int(relaxation.constant[found.peak_step]))
            covers.append((relaxation.static_bytes(found.peak_step), room))
        done = False
        for sizes, room in covers:
            largest = [c for c in sorted(chosen, key=lambda c: (-sizes[c], c)) if sizes[c] > 0]
            for count in range(1, len(largest) + 1):
                if fsum(sizes[largest[:count]]) > room:
                    self._forbid(largest[:count])
                    done = True
                    break
        if not done:
            taken = set(chosen)
            self._forbid(chosen, [c for c in range(relaxation.binaries) if c not in taken])

    # -- large problems

    def _relax(self) -> None:
        """Relaxations, whose answers are rounded and mended, before any integer program."""
        gap = 1.0
        if self.problem.budget is not None:  # what the first relaxation would be rounded to: the cheapest
            for step in _worst(evaluate(self.problem, self.cheapest).live_bytes, self.problem.budget):
                self.relaxation.add_peak(step)
        for _ in range(_RELAXATIONS):
            if self._late() or self._round(linear=True) is None or self.infeasible:
                return
            if self.best is not None and gap - self.gap() < _PROGRESS:
                return
            gap = self.gap()


def _worst(live: NDArray[np.int64] | Floats, limit: float) -> list[int]:
    """The steps over the limit, the worst of each stretch, worst first."""
    over = np.flatnonzero(live > limit)
    if not over.size:
        return []
    stretches = np.split(over, np.flatnonzero(np.diff(over) > 1) + 1)
    tops = [int(s[np.argmax(live[s])]) for s in stretches]
    return sorted(tops, key=lambda t: (-live[t], t))[:_ROWS]
