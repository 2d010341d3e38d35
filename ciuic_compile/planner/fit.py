"""A plan under a budget: keep, rebuild and codec chosen together, on the peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..errors import InfeasibleBudgetError
from ..simulate import Peaks
from .formulate import Formulation
from .program import Decision, Evaluation, Problem, evaluate
from .search import EXACT, Clock
from .solve import Bound, Infeasible, Price, Solution, prices, solve

#: Peaks when these nodes are saved, with these codecs, in the rewritten graphs.
Judge = Callable[[Sequence[fx.Node], Mapping[fx.Node, str | None]], Peaks]

#: Shares of the deadline for one answer after the other; those after the first go on from it.
_SHARES = (0.35, 0.2, 0.1, 0.1, 0.1)
#: Answers after which the program is raised where they had their peaks, if none leaves as little of the
#: budget as is wanted, or the program is off by more than that.
_LOCAL = 3
#: Where none of those above is within the budget: how much lower those after them are aimed, as a share of
#: it, and the deadline's share for each. (What a ResNet's program was off by grew with every answer; the
#: smallest plan costs three times what the one that fits does.)
_LOWER, _MORE = (0.0, 0.01, 0.03, 0.1), 0.02
#: That for the prices.
_PRICES = 0.08
_GAP = 0.005
#: Bytes of budget that the prices are for; at most a tenth of it.
_STEP = 2**30
#: Room under the budget that is worth one more round, as a share of it.
_ROOM = 0.02
#: By how much the gap to a plan's certificate may be wider than its program's, where that is over _GAP.
_WIDER = 0.01


@dataclass(frozen=True)
class Fit:
    """What is saved under a budget, how, and the optimiser's certificate.

    Attributes:
        evaluation: what the decision does in the program; its cost is microseconds, error counted in.
        bound: no decision within the program's limits costs less.
        gap: ``(cost - bound) / cost``.
        struck: the deadline ended the search.
        price: what more and less of budget would change, by the program.
    """

    saved: tuple[fx.Node, ...]
    codecs: Mapping[fx.Node, str | None]
    peaks: Peaks
    decision: Decision
    evaluation: Evaluation
    bound: float = 0.0
    gap: float = 1.0
    struck: bool = False
    price: Price | None = None

    @property
    def drift(self) -> int:
        """Bytes by which the rewritten graphs' peak is above the program's."""
        return self.peaks.peak - self.evaluation.peak_bytes


def fit(
    formulation: Formulation,
    budget: int,
    start: Decision,
    judged_before: tuple[Decision, Peaks | None],
    judge: Judge,
    seconds: float,
    max_saved: int | None = None,
    max_variance: float | None = None,
) -> Fit:
    """The cheapest decision whose simulated peak is within ``budget`` bytes.

    The program's peak is an estimate of the rewritten graphs'; what it was off by is taken off its budget,
    and it is solved again, a few times. Where that does not do, it is raised at the steps where the graphs'
    peaks were: kernels that compute several values at once need more than the program knows there.

    Args:
        start: a decision that saves little.
        judged_before: another decision, and what the judge said of it, if asked.
        judge: says what the rewritten graphs take.
        seconds: deadline for everything.

    Raises:
        InfeasibleBudgetError: with the smallest peak that was found, and what is alive there.
    """
    problem = replace(formulation.problem, max_saved=max_saved, max_variance=max_variance)

    def judged(decision: Decision, peaks: Peaks | None = None) -> Fit:
        saved, codecs = formulation.saved(decision), formulation.stored(decision)
        return Fit(saved, codecs, peaks or judge(saved, codecs), decision, evaluate(problem, decision))

    def within_limits(found: Fit) -> bool:
        return found.peaks.peak <= budget and _keeps_limits(problem, found.evaluation)

    def close(found: Fit) -> bool:
        return abs(budget - found.peaks.peak) <= _ROOM * budget

    def near(found: Fit) -> bool:
        return found.peaks.peak <= budget and close(found)

    def far_off(found: Fit) -> bool:
        return abs(found.drift) > _ROOM * budget

    first = judged(*judged_before)
    drift = first.drift
    tried, struck = [first], False
    bounds: list[Bound] = []
    asked: list[tuple[int, bool]] = []  # budgets, and whether the graphs of their answers were within ours
    enough, raised, local = 0.0, problem, False
    idle: Problem | None = None  # a program that told nothing new
    rounds = [*((share, 0.0) for share in _SHARES), *((_MORE, lower) for lower in _LOWER)]
    clock = Clock(seconds * sum(share for share, _ in rounds))
    for number, (share, lower) in enumerate(rounds):
        if number >= len(_SHARES) and any(map(within_limits, tried)):
            break
        local |= number >= _LOCAL and (far_off(tried[-1]) or not (close(tried[-1]) or any(map(near, tried))))
        if local:
            drift = min(f.drift for f in tried)
            raised = _raised(formulation, problem, drift, tried)
        wanted = budget - drift if local else _between(budget - drift, asked)
        aimed = wanted - int(lower * budget)
        within = raised.within(aimed)
        if idle is not None and (within.budget, within.base) == (idle.budget, idle.base):
            continue
        before = [f.decision for f in tried]
        warm = before[-1] if len(before) > 1 else None
        starts = [start, *before]
        solution = solve(within, seconds * share, _GAP, starts, warm, clock.left(), bounds, enough)
        if not isinstance(solution, Infeasible):
            struck |= solution.struck
            bounds += () if local else solution.bounds
        if solution.decision is None:
            break
        if solution.decision in before:
            idle = within  # another is found only lower
            continue
        found = judged(solution.decision)
        if not isinstance(solution, Infeasible):
            found = replace(found, bound=solution.bound, gap=solution.gap)
        tried.append(found)
        over = found.peaks.peak > budget
        if not local:
            drift = found.drift
            asked.append((aimed, not over))
        if isinstance(solution, Infeasible) and over and (number == 0 or local):
            break
        # The bound must be of a program that leaves room for this answer's own drift.
        enough = found.gap + _WIDER if _GAP < found.gap < 1.0 else _GAP
        proved = _certified(found, budget, bounds).gap <= enough
        if near(found) and (local or (proved and not far_off(found))):
            break
        local |= near(found) and proved
    fitting = list(filter(within_limits, tried))
    if fitting:
        best = min(fitting, key=lambda f: f.evaluation.cost)
        if _certified(best, budget, bounds).gap > enough:  # of this program, at what its drift leaves
            known = problem.within(budget - best.drift)
            proof = solve(known, seconds * _MORE, _GAP, [best.decision], None, clock.left(), bounds)
            bounds += () if isinstance(proof, Infeasible) else proof.bounds
        best = _certified(best, budget, bounds)
        limited = problem.within(max(budget - best.drift, best.evaluation.peak_bytes))
        price = prices(limited, best, max(1, min(_STEP, budget // 10)), seconds * _PRICES, _GAP)
        return replace(best, struck=struck, price=price)
    # These are tried whatever the budget: the smallest peak that is named can be had by asking for it.
    certificate = solve(problem.within(0), seconds, _GAP, [start, first.decision])
    every = [judged(start), first]
    if isinstance(certificate, Infeasible) and certificate.decision is not None:
        every.append(judged(certificate.decision))
    keeping = [f for f in every if _keeps_limits(problem, f.evaluation)]
    least = min(keeping or every, key=lambda f: f.peaks.peak)
    if keeping and least.peaks.peak <= budget:
        return replace(least, struck=struck)
    raise _infeasible(formulation, budget, least.peaks.peak, certificate)


def _between(wanted: int, asked: Sequence[tuple[int, bool]]) -> int:
    """The budget that is wanted or, if that was too much or too little before, one halfway between such."""
    low = max((b for b, fits in asked if fits), default=None)
    high = min((b for b, fits in asked if not fits), default=None)
    if low is None or high is None or low < wanted < high:
        return wanted
    return (low + high) // 2


def _raised(formulation: Formulation, problem: Problem, drift: int, tried: Sequence[Fit]) -> Problem:
    """The program with as much more alive as answers needed where their graphs' peaks were.

    Args:
        drift: what is taken off the budget at every step.
    """
    base = list(problem.base)
    for found in tried:
        step = next((formulation.steps[name] for name in found.peaks.rest if name in formulation.steps), None)
        if step is not None and found.peaks.peak > found.peaks.forward:
            more = found.peaks.peak - drift - int(found.evaluation.live_bytes[step])
            base[step] = max(base[step], problem.base[step] + more)
    return replace(problem, base=tuple(base))


def _certified(found: Fit, budget: int, bounds: Sequence[Bound]) -> Fit:
    """With what was proved about the budget that its own drift leaves.

    The round that found it may have had a tighter one, whose bound is too high for what the judge allows.
    """
    cost = found.evaluation.cost
    if cost <= 0:
        return replace(found, bound=0.0, gap=0.0)
    bound = min(max((b.at(budget - found.drift) for b in bounds), default=0.0), cost)
    gap = (cost - bound) / cost
    return replace(found, bound=bound, gap=gap if gap > EXACT else 0.0)


def _keeps_limits(problem: Problem, found: Evaluation) -> bool:
    saved, variance = problem.max_saved, problem.max_variance
    return (saved is None or found.saved_bytes <= saved) and (variance is None or found.variance <= variance)


def _infeasible(
    formulation: Formulation, budget: int, smallest: int, certificate: Infeasible | Solution
) -> InfeasibleBudgetError:
    message = (
        f"budget {budget:,} bytes: the smallest planned peak found for this graph is {smallest:,} bytes "
        f"({smallest / 2**20:.1f} MiB); raise the budget to {smallest} bytes, or make the batch smaller"
    )
    if isinstance(certificate, Infeasible) and certificate.live:
        model = formulation.model
        lines = []
        for live in certificate.live[:5]:
            node = formulation.nodes[live.candidate]
            source = model.source(node)
            where = f"{source.file}:{source.line}" if source.file else str(node.target)
            lines.append(f"  {live.nbytes:>16,} bytes  {node.name}  {source.module}  {where}")
        message += "\nalive at its peak, largest first:\n" + "\n".join(lines)
    return InfeasibleBudgetError(message, budget_bytes=budget, smallest_bytes=smallest)
