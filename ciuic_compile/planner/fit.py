"""A plan under a budget: keep, rebuild and codec chosen together, on the peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from ..errors import InfeasibleBudgetError
from ..simulate import Peaks
from .formulate import Formulation
from .program import Decision, Problem, evaluate
from .solve import Infeasible, Solution, solve

#: Peaks when these nodes are saved, with these codecs, in the rewritten graphs.
Judge = Callable[[Sequence[fx.Node], Mapping[fx.Node, str | None]], Peaks]

_ROUNDS = 4
_GAP = 0.005
#: Room under the budget that is worth one more round, as a share of it.
_ROOM = 0.02


@dataclass(frozen=True)
class Fit:
    """What is saved under a budget, how, and the optimiser's certificate.

    Attributes:
        solution: its costs are microseconds, error counted in.
        problem: what was solved, with its limits.
    """

    saved: tuple[fx.Node, ...]
    codecs: Mapping[fx.Node, str | None]
    peaks: Peaks
    solution: Solution
    problem: Problem


def fit(
    formulation: Formulation,
    budget: int,
    start: Decision,
    judge: Judge,
    seconds: float,
    max_saved: int | None = None,
    max_variance: float | None = None,
) -> Fit:
    """The cheapest decision whose simulated peak is within ``budget`` bytes.

    The program's peak is an estimate of the rewritten graphs'; what it was off by is taken off its budget and it
    is solved again, a few times.

    Args:
        start: a decision that saves little.
        judge: says what the rewritten graphs take.
        seconds: deadline for everything.

    Raises:
        InfeasibleBudgetError: with the smallest peak that was found, and what is alive there.
    """
    problem = replace(formulation.problem, max_saved=max_saved, max_variance=max_variance)
    drift = _drift(formulation, judge, problem, start)
    best: Fit | None = None
    smallest, certificate = 2**62, None
    starts = [start]
    for _ in range(_ROUNDS):
        limited = replace(problem, budget=budget - drift)
        solution = solve(limited, seconds / _ROUNDS, _GAP, starts)
        decision = solution.decision
        if decision is None:
            break
        saved, codecs = formulation.saved(decision), formulation.stored(decision)
        peaks = judge(saved, codecs)
        if peaks.peak < smallest:
            smallest = peaks.peak
        if isinstance(solution, Infeasible):
            certificate = solution
            if peaks.peak > budget:
                break
        elif peaks.peak <= budget and (best is None or solution.evaluation.cost < best.solution.evaluation.cost):
            best = Fit(saved, codecs, peaks, solution, limited)
        starts.append(decision)
        change = peaks.peak - evaluate(problem, decision).peak_bytes - drift
        if change == 0 or (best is not None and 0 <= -change <= _ROOM * budget):
            break
        drift += change
    if best is None:
        raise _infeasible(formulation, budget, smallest, certificate)
    return best


def _drift(formulation: Formulation, judge: Judge, problem: Problem, decision: Decision) -> int:
    peaks = judge(formulation.saved(decision), formulation.stored(decision))
    return peaks.peak - evaluate(problem, decision).peak_bytes


def _infeasible(
    formulation: Formulation, budget: int, smallest: int, certificate: Infeasible | None
) -> InfeasibleBudgetError:
    message = (
        f"budget {budget:,} bytes: the smallest planned peak found for this graph is {smallest:,} bytes "
        f"({smallest / 2**20:.1f} MiB); raise the budget to {smallest} bytes, or make the batch smaller"
    )
    if certificate is not None and certificate.live:
        model = formulation.model
        lines = []
        for live in certificate.live[:5]:
            node = formulation.nodes[live.candidate]
            source = model.source(node)
            where = f"{source.file}:{source.line}" if source.file else str(node.target)
            lines.append(f"  {live.nbytes / 2**20:10.1f} MiB  {node.name}  {source.module}  {where}")
        message += "\nalive at its peak, largest first:\n" + "\n".join(lines)
    return InfeasibleBudgetError(message, budget_bytes=budget, smallest_bytes=smallest)
