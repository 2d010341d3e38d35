"""The rounds of a budget: certified is the plan that is kept, under the budget that the judge leaves."""

from __future__ import annotations

import importlib
import random
from types import SimpleNamespace
from typing import Any

import pytest

from ciuic_compile.errors import InfeasibleBudgetError
from ciuic_compile.planner import search
from ciuic_compile.planner.fit import fit
from ciuic_compile.planner.program import ABSENT, Candidate, Decision, Problem, Rebuild, Store, evaluate
from ciuic_compile.planner.search import Search
from ciuic_compile.planner.solve import solve as solve_once
from tests.planner.planning import random_problem


class Plain:
    """A formulation whose "nodes" are the decision itself."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.steps = problem, {"late": 2}
        self.nodes = [SimpleNamespace(name=c.name, target=c.name) for c in problem.candidates]
        self.model = SimpleNamespace(source=lambda node: SimpleNamespace(file="", line=0, module=""))

    def saved(self, decision: Decision) -> Decision:
        return decision

    def stored(self, decision: Decision) -> dict[Any, None]:
        return {}


def heavy_forward(values: list[tuple[int, float]]) -> Problem:
    """Values of so many bytes, which take so long to make again, and weigh in the forward if stored."""
    candidates = (
        Candidate(f"v{i}", size, 0, 0, (2,), (Store(size),), Rebuild(us))
        for i, (size, us) in enumerate(values)
    )
    return Problem(2, (0, 1000, 0, 0), tuple(candidates))


def test_the_gap_is_that_of_the_budget_that_the_judge_leaves() -> None:
    """The first round is too tight; the second finds a cheaper plan, which the judge rejects."""
    # Step 1, in the forward, is where stores weigh: what is rebuilt is alive in the backward all the same.
    problem = heavy_forward([(100, 10.0), (60, 8.0), (40, 5.0)])
    drifts = {(0, 0, 0): 100}

    def judge(decision: Any, codecs: Any) -> Any:
        peak = evaluate(problem, decision).peak_bytes + drifts.get(decision, 0)
        return SimpleNamespace(peak=peak, forward=peak, rest=())

    every = (0, 0, 0)
    formulation: Any = Plain(problem)
    start = (ABSENT, ABSENT, ABSENT)
    found = fit(formulation, 1200, start, (every, judge(every, None)), judge, 10.0)
    drift = found.peaks.peak - found.evaluation.peak_bytes
    assert found.peaks.peak <= 1200 and drift == 0
    best = Search(Problem(2, problem.base, problem.candidates, budget=1200), "cost", 10.0, 0.0)
    best.run()
    assert best.best is not None
    assert found.bound <= best.best[1].cost * (1 + 1e-9)
    assert found.evaluation.cost > 0
    assert found.gap == pytest.approx(1 - found.bound / found.evaluation.cost, abs=1e-6)


def test_an_answer_whose_own_drift_leaves_room_is_not_the_last() -> None:
    """Keeping everything drifts by 20 bytes, so 1180 are solved for first; the answer drifts by none."""
    sizes = [(100, 10.0), (60, 8.0), (40, 5.0), (19, 1.0)]
    problem = heavy_forward(sizes)
    every, none = (0,) * 4, (ABSENT,) * 4

    def judge(decision: Any, codecs: Any) -> Any:
        return SimpleNamespace(peak=evaluate(problem, decision).peak_bytes + 20 * (decision == every))

    formulation: Any = Plain(problem)
    found = fit(formulation, 1200, none, (every, judge(every, None)), judge, 10.0)
    assert found.decision == (0, 0, 0, ABSENT)  # of 1180, the third would be rebuilt: 5 us
    assert (found.peaks.peak, found.evaluation.cost, found.gap) == (1200, 1.0, 0.0)


def test_a_start_that_is_the_answer_is_judged_too() -> None:
    """It alone is within the first round's budget; what is found lower would cost more."""
    value = Candidate(
        "v", 100, 0, 0, (2,), (Store(100), Store(50, 1.0, codec="int8"), Store(10, 9.0, codec="int4"))
    )
    problem = Problem(2, (0, 1000, 0, 0), (value,))

    def judge(decision: Any, codecs: Any) -> Any:
        return SimpleNamespace(peak=evaluate(problem, decision).peak_bytes + 10 * (decision == (0,)))

    formulation: Any = Plain(problem)
    found = fit(formulation, 1060, (1,), ((0,), judge((0,), None)), judge, 10.0)
    assert (found.decision, found.evaluation.cost, found.gap) == ((1,), 1.0, 0.0)


def test_the_same_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first round finds was known, and within the budget: nothing is left to correct."""
    value = Candidate("v", 100, 0, 0, (2,), (Store(100), Store(50, 1.0, codec="int8")))
    problem = Problem(2, (0, 1000, 0, 0), (value,))

    def judge(decision: Any, codecs: Any) -> Any:
        return SimpleNamespace(peak=evaluate(problem, decision).peak_bytes)

    fits = importlib.import_module("ciuic_compile.planner.fit")
    asked: list[int | None] = []

    def solve(problem: Problem, *args: Any) -> Any:
        asked.append(problem.budget)
        return solve_once(problem, *args)

    monkeypatch.setattr(fits, "solve", solve)
    formulation: Any = Plain(problem)
    found = fit(formulation, 1060, (0,), ((1,), judge((1,), None)), judge, 10.0)
    assert (found.decision, found.gap, asked) == ((1,), 0.0, [1060])


def test_time_that_runs_out_between_two_programs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    value = Candidate("v", 10, 0, 0, (1,), (Store(10),), Rebuild(1.0))
    search = Search(Problem(1, (0, 0), (value,), budget=15), "cost", 100.0, 0.0)
    monkeypatch.setattr(search, "seed", lambda: None)
    monkeypatch.setattr(search.clock, "over", lambda: True)
    search.run()
    assert search.best is None and search.struck


def test_a_round_without_a_plan_does_not_end_the_search_of_a_large_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first round is for a budget that nothing meets; what it lacks as a certificate is no measure."""
    monkeypatch.setattr(search, "_SMALL", 0)
    sizes = [(100, 10.0), (60, 8.0), (40, 5.0), (30, 4.0), (25, 3.0), (70, 9.0)]
    problem = heavy_forward(sizes)
    every = (0,) * 6

    def judge(decision: Any, codecs: Any = None) -> Any:
        return SimpleNamespace(peak=evaluate(problem, decision).peak_bytes + 500 * (decision == every))

    start = (ABSENT,) * 5 + (0,)
    found = fit(Plain(problem), 1170, start, (every, judge(every)), judge, 10.0)  # type: ignore[arg-type]
    assert (found.evaluation.cost, found.gap) == (17.0, 0.0)


def test_the_program_is_raised_where_graphs_over_the_budget_had_their_peaks() -> None:
    """A kernel at step 2 keeps 50 bytes more wherever both of two values are made again there.

    Taking that off the budget of every step leaves nothing at step 3.
    """
    values = [
        Candidate(f"v{i}", 100, 0, 0, (read,), (Store(100),), Rebuild(us))
        for i, (read, us) in enumerate([(2, 1.0), (2, 2.0), (3, 50.0)])
    ]
    problem = Problem(2, (0, 150, 0, 205), tuple(values))

    def judge(decision: Any, codecs: Any) -> Any:
        found = evaluate(problem, decision)
        if decision == start:
            return SimpleNamespace(peak=400, forward=0, rest=())
        fused = int(found.live_bytes[2]) + 50 if decision[:2] == (ABSENT, ABSENT) else 0
        forward = int(max(found.live_bytes[:2]))
        return SimpleNamespace(peak=max(found.peak_bytes, fused), forward=forward, rest=("again", "late"))

    every, start = (0, 0, 0), (ABSENT, ABSENT, ABSENT)
    formulation: Any = Plain(problem)
    found = fit(formulation, 310, start, (every, judge(every, None)), judge, 10.0)
    assert found.decision == (ABSENT, 0, ABSENT) and found.peaks.peak <= 310
    assert 0 < found.bound <= 3.0, "of the program as it was, which two values made again would fit"


@pytest.mark.parametrize("seed", [1246, 1562, 2467, 1, 2, 3])
def test_the_smallest_peak_that_an_error_names_can_be_had(seed: int) -> None:
    """Also where another budget's answer is smaller: graphs are off by what they like."""
    rng = random.Random(seed)
    problem = random_problem(rng)
    formulation: Any = Plain(problem)

    def judge(decision: Any, codecs: Any) -> Any:
        peak = evaluate(problem, decision).peak_bytes
        drift = random.Random(repr(decision)).randint(-peak // 3, peak // 3)
        return SimpleNamespace(peak=peak + drift, forward=0, rest=())

    every = tuple(0 if c.stores else ABSENT for c in problem.candidates)
    start = tuple(ABSENT if c.rebuild else 0 for c in problem.candidates)

    def planned(budget: int) -> int:
        return int(fit(formulation, budget, start, (every, judge(every, None)), judge, 10.0).peaks.peak)

    with pytest.raises(InfeasibleBudgetError) as caught:
        planned(int(rng.uniform(0.3, 1.0) * evaluate(problem, start).peak_bytes))
    smallest = caught.value.smallest_bytes
    assert planned(smallest) <= smallest


def test_between_a_budget_that_was_too_much_and_one_too_little_another_is_tried() -> None:
    """What the judge adds comes and goes with a value: its last word alone would swing to and fro."""
    sizes = [(100, 10.0), (60, 8.0), (40, 5.0), (30, 4.0)]
    problem = heavy_forward(sizes)
    every = (0,) * 4

    def judge(decision: Any, codecs: Any) -> Any:
        peak = evaluate(problem, decision).peak_bytes + (100 if decision[3] == 0 else 0)
        return SimpleNamespace(peak=peak, forward=peak, rest=())

    formulation: Any = Plain(problem)
    found = fit(formulation, 1200, (ABSENT,) * 4, (every, judge(every, None)), judge, 10.0)
    assert found.decision == (0, 0, 0, ABSENT) and found.peaks.peak == 1200
