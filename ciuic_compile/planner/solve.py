"""Solve a planning problem: HiGHS on a growing set of peak rows, judged by the exact simulator.

Each round solves the rows so far, simulates the answer and adds the rows of the steps that are over
budget. All rows hold for every decision, so each round's dual bound is a bound for the whole problem.
HiGHS accepts a row that is exceeded by a millionth; the simulator does not, and what it rejects though its
row is there is cut off by name. Large problems first solve linear relaxations, for their bound and for the
answers that greedy moves make of them; integer programs follow where they are likely to end in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Literal, Protocol

from .program import ABSENT, Decision, Evaluation, Problem, evaluate, live_at
from .search import EXACT, Search

#: Share of the deadline for the first search; the rest is for what to say if it finds nothing.
_FIRST = 0.7

#: What sums and HiGHS's duals are off by at most, of the terms of a bound at another budget: they may cancel.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Bound:
    """No decision within ``budget`` bytes costs less than the smaller of ``value`` and ``most``.

    Attributes:
        slope: the value falls by no more than this with every byte more, and rises by no less with every byte
            less (a linear program's optimum is convex in its right sides); infinite where that is unknown.
    """

    budget: int
    value: float
    slope: float = inf
    most: float = inf

    def at(self, budget: int) -> float:
        """What no decision within another budget undercuts."""
        if self.slope == inf:
            return self.value if budget <= self.budget else 0.0
        change = self.slope * (budget - self.budget)
        rounding = _ROUNDING * max(abs(self.value), abs(change))
        return min(max(0.0, self.value - change - rounding), self.most)


@dataclass(frozen=True, eq=False)
class Solution:
    """The best decision found.

    Attributes:
        bound: no decision within the limits costs less.
        gap: ``(cost - bound) / cost``; 0.0 where it is below HiGHS's own tolerance (1e-6).
        rounds: programs solved.
        struck: the deadline ended something; another run may find another answer.
        bounds: what was proved under the problem's budget, and so about others.
    """

    decision: Decision
    evaluation: Evaluation
    bound: float
    gap: float
    rounds: int
    struck: bool = False
    bounds: tuple[Bound, ...] = ()


class Decided(Protocol):
    """A decision and what it does."""

    @property
    def decision(self) -> Decision: ...

    @property
    def evaluation(self) -> Evaluation: ...


@dataclass(frozen=True)
class Live:
    """A candidate alive at the step that decides, with the fewest bytes it can have there.

    ``least_bytes`` changes this candidate's choice alone; it equals ``nbytes`` where nothing helps.
    """

    candidate: int
    nbytes: int
    least_bytes: int


@dataclass(frozen=True)
class Infeasible:
    """No decision meets the limits, or none was found before the deadline.

    Attributes:
        limit: the limit that cannot be met, the others holding ("saved" and "variance" are named only
            if they cannot be met whatever the budget).
        smallest: the smallest value of that limit for which a decision was found; None if none was.
        bound: no decision goes below this; equal to ``smallest`` where that is proved.
        proved: whether ``bound`` is above the limit that was asked for.
        decision: the one that reaches ``smallest``.
        step: where it has its peak ("budget" only, else -1).
        live: the candidates alive there, largest first ("budget" only).
    """

    limit: Literal["budget", "saved", "variance"]
    smallest: float | None
    bound: float
    proved: bool
    decision: Decision | None = None
    step: int = -1
    live: tuple[Live, ...] = ()
    rounds: int = 0


@dataclass(frozen=True)
class Price:
    """What changing the budget changes, in the units of the cost (microseconds, by default).

    Attributes:
        step_bytes: by how much the budget was moved.
        more_saves: what one step more saves at least.
        less_costs: what one step less costs at most; None if no plan was found there.
    """

    step_bytes: int
    more_saves: float
    less_costs: float | None


def solve(
    problem: Problem,
    deadline_s: float = 10.0,
    gap: float = 0.005,
    starts: Sequence[Decision] = (),
    warm: Decision | None = None,
    patience: float = 0.0,
    known: Sequence[Bound] = (),
    enough: float = 0.0,
) -> Solution | Infeasible:
    """The cheapest decision within the limits; ties go to less variance, then to fewer bytes saved.

    The answer is the same every time, on every machine, unless the deadline ends the search (``struck``):
    what is tried within it is counted in work, of which a machine of today does twice as much in that time.

    Args:
        deadline_s: seconds after which the best decision so far is returned, with its gap.
        gap: relative distance to the optimum that is good enough; 0.0 asks for the optimum.
        starts: decisions known to be good; the answer is no worse than those within the limits.
        warm: the answer to a problem like this one, to go on from.
        patience: seconds that a slow machine may take for what should fit in the deadline.
        known: what was proved of the same problem under other budgets.
        enough: a gap that is good enough for what greedy moves find in a large problem.
    """
    proved = max((b.at(problem.budget) for b in known), default=0.0) if problem.budget is not None else 0.0
    search = Search(problem, "cost", deadline_s * _FIRST, gap, starts, warm, patience * _FIRST, proved)
    search.run(enough)
    found = _solution(search)
    if found is not None:
        return found
    left = max(deadline_s - search.clock.elapsed(), (1 - _FIRST) * deadline_s)
    if problem.budget is not None:
        peak, infeasible = _smallest(problem.within(None), "peak", left, gap, starts)
        if peak is not None and peak.peak_bytes <= problem.budget:
            assert infeasible.decision is not None
            again = Search(problem, "cost", 0.0, gap, [infeasible.decision])
            again.seed()
            again.bound = 0.0 if search.infeasible else search.bound  # a proof that this one refutes
            found = _solution(again)
            assert found is not None
            return replace(found, rounds=search.rounds + infeasible.rounds, struck=search.struck)
        if peak is not None or not infeasible.proved:
            return replace(
                infeasible,
                proved=search.infeasible or infeasible.bound > problem.budget,
                bound=max(infeasible.bound, problem.budget + 1 if search.infeasible else 0),
                live=_live(problem, infeasible),
                rounds=search.rounds + infeasible.rounds,
            )
    if problem.max_saved is not None:
        _, infeasible = _smallest(replace(problem, budget=None, max_saved=None), "saved", left, gap)
        if not infeasible.proved:
            return replace(infeasible, proved=infeasible.bound > problem.max_saved)
    unlimited = replace(problem, budget=None, max_saved=None, max_variance=None)
    _, infeasible = _smallest(unlimited, "variance", left, gap)
    proved = problem.max_variance is not None and infeasible.bound > problem.max_variance
    return replace(infeasible, proved=proved or search.infeasible)


def _solution(search: Search) -> Solution | None:
    if search.best is None:
        return None
    decision, evaluation = search.best
    gap = search.gap()
    gap = gap if gap > EXACT else 0.0
    bounds: tuple[Bound, ...] = ()
    if (budget := search.problem.budget) is not None:
        bounds = (Bound(budget, search.bound), *(Bound(budget, *slope) for slope in search.slopes))
    return Solution(decision, evaluation, search.bound, gap, search.rounds, search.struck, bounds)


def _smallest(
    problem: Problem,
    metric: Literal["peak", "saved", "variance"],
    seconds: float,
    gap: float,
    starts: Sequence[Decision] = (),
) -> tuple[Evaluation | None, Infeasible]:
    """Least peak, saved bytes or variance; ``proved`` says here that there is no decision at all."""
    search = Search(problem, metric, seconds, gap, starts)
    search.run()
    limit: Literal["budget", "saved", "variance"] = "budget" if metric == "peak" else metric
    if search.best is None:
        return None, Infeasible(limit, None, search.bound, search.infeasible, rounds=search.rounds)
    decision, evaluation = search.best
    bound, rounds = search.bound, search.rounds
    if metric != "variance":
        bound = ceil(bound * (1 - EXACT))
        # HiGHS is exact to a millionth only; whether one byte less is possible is a question it can answer.
        while gap <= EXACT and bound < search.value(evaluation) and not search.clock.over():
            less = int(search.value(evaluation)) - 1
            if metric == "peak":
                tighter = replace(problem, budget=less, time_weight=0.0, variance_weight=0.0)
            else:
                tighter = replace(problem, max_saved=less, time_weight=0.0, variance_weight=0.0)
            below = Search(tighter, "any", search.clock.left(), 0.0)
            below.run()
            rounds += below.rounds
            if below.best is not None:
                decision, evaluation = below.best
            elif below.infeasible:
                bound = less + 1
            else:
                break
    value = search.value(evaluation)
    step = evaluation.peak_step if metric == "peak" else -1
    return evaluation, Infeasible(limit, value, min(bound, value), False, decision, step, (), rounds)


def _live(problem: Problem, found: Infeasible, most: int = 12) -> tuple[Live, ...]:
    """The largest candidates at the peak of the decision with the smallest peak."""
    if found.decision is None:
        return ()
    decision = found.decision
    free = problem.within(None)
    sizes = live_at(free, decision, found.step)
    total = int(evaluate(free, decision).live_bytes[found.step])
    largest = sorted((v for v, size in enumerate(sizes) if size > 0), key=lambda v: (-sizes[v], v))[:most]
    result = []
    for v in largest:
        least = sizes[v]
        for choice in (ABSENT, *range(len(problem.candidates[v].stores))):
            changed = evaluate(free, (*decision[:v], choice, *decision[v + 1 :]))
            if changed.feasible:
                least = min(least, sizes[v] + int(changed.live_bytes[found.step]) - total)
        result.append(Live(v, sizes[v], max(least, 0)))
    return tuple(result)


def prices(
    problem: Problem,
    solution: Decided,
    step_bytes: int | None = None,
    deadline_s: float = 2.0,
    gap: float = 0.005,
) -> Price:
    """What one step of budget is worth, by planning again with one more and one less.

    Large problems are only searched by greedy moves from the solution: a bound is not asked for.

    Args:
        step_bytes: default the smaller of 1 GiB and a tenth of the budget.
        deadline_s: seconds for each of the two.
    """
    if problem.budget is None:
        raise ValueError("a plan without a budget has no price of memory")
    step = step_bytes if step_bytes is not None else max(1, min(2**30, problem.budget // 10))
    if step <= 0:
        raise ValueError(f"the step must be positive, not {step}")
    cost, found = solution.evaluation.cost, solution.decision

    def searched(budget: int) -> Evaluation | None:
        search = Search(problem.within(budget), "cost", deadline_s, gap, [found], warm=found)
        search.run(enough=1.0)
        return search.best[1] if search.best else None

    more, less = searched(problem.budget + step), searched(problem.budget - step)
    assert more is not None, "what fits the budget fits a larger one"
    return Price(step, max(0.0, cost - more.cost), max(0.0, less.cost - cost) if less else None)
