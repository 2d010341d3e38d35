"""The planner's solver against every decision there is, and on problems too large for that."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.plan_time import budgets, layered
from ciuic_compile.planner import relaxation, search
from ciuic_compile.planner.assign import Option, assign
from ciuic_compile.planner.program import Candidate, Problem, Rebuild, Store, evaluate
from ciuic_compile.planner.solve import Bound, Infeasible, Live, Solution, prices, solve
from tests.planner.planning import Every, every, random_problem

ROOT = Path(__file__).parents[2]


def limited(rng: random.Random, problem: Problem, judge: Every) -> Problem:
    """The problem with limits at which the choice is not obvious: those of some decision, or a byte off."""
    peaks = np.unique(judge.peak)
    budget = int(rng.choice(peaks[: max(1, len(peaks) // 2)])) + rng.choice([0, 0, 0, -1, 1])
    problem = replace(problem, budget=None if rng.random() < 0.1 else budget)
    if rng.random() < 0.3:
        problem = replace(problem, max_saved=int(rng.choice(judge.saved)) - rng.choice([0, 0, 0, 1]))
    if rng.random() < 0.3:
        problem = replace(problem, max_variance=float(rng.choice(judge.variance)))
    if rng.random() < 0.3:
        problem = replace(problem, time_weight=1e-8, variance_weight=1.0)
    return problem


def check(problem: Problem, judge: Every, found: Solution | Infeasible) -> None:
    """Compare with all decisions."""
    allowed = judge.allowed(problem)
    if not allowed.any():
        check_infeasible(problem, judge, found)
        return
    assert isinstance(found, Solution)
    assert found.evaluation.feasible
    again = evaluate(problem, found.decision)
    assert (again.cost, again.peak_bytes) == (found.evaluation.cost, found.evaluation.peak_bytes)
    cost = problem.time_weight * judge.time_us + problem.variance_weight * judge.variance
    best = cost[allowed].min()
    assert found.evaluation.cost == pytest.approx(best, rel=1e-6, abs=0.0)
    assert found.bound <= best * (1 + 1e-9)
    assert found.gap == 0.0


def check_infeasible(problem: Problem, judge: Every, found: Solution | Infeasible) -> None:
    """The limit that is named cannot be met, and the smallest one is exact."""
    assert isinstance(found, Infeasible) and found.proved and found.decision is not None
    if found.limit == "budget":
        rest = replace(problem, budget=None)
        smallest = judge.peak[judge.allowed(rest)].min()
        assert found.bound == smallest > (problem.budget or 0)
        assert evaluate(rest, found.decision).peak_bytes == smallest
        assert evaluate(rest, found.decision).feasible
    else:
        assert found.limit == "saved"
        rest = replace(problem, budget=None, max_saved=None)
        smallest = judge.saved[judge.allowed(rest)].min()
        assert found.bound == smallest > (problem.max_saved or 0)
        assert evaluate(rest, found.decision).saved_bytes == smallest
    assert found.smallest == smallest


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(10))
def test_ten_thousand_random_problems(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunk % 2:  # the lazy forms, which small problems would never see
        monkeypatch.setattr(relaxation, "_EXACT_AT_ONCE", 0)
    if chunk % 3 == 2:  # relaxations first, as in large problems
        monkeypatch.setattr(search, "_SMALL", 0)
    infeasible = 0
    for seed in range(chunk * 1000, chunk * 1000 + 1000):
        rng = random.Random(seed)
        problem = random_problem(rng, chains=chunk >= 7)
        judge = every(problem)
        problem = limited(rng, problem, judge)
        found = solve(problem, gap=0.0)
        infeasible += isinstance(found, Infeasible)
        try:
            check(problem, judge, found)
        except AssertionError as e:
            raise AssertionError(f"seed {seed}") from e
    assert 50 < infeasible < 500


def test_random_problems_of_up_to_twelve_candidates() -> None:
    for seed in range(200):
        rng = random.Random(f"twelve {seed}")
        problem = random_problem(rng, 12)
        judge = every(problem)
        problem = limited(rng, problem, judge)
        check(problem, judge, solve(problem, gap=0.0))


def test_what_is_proved_of_one_budget_holds_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_SMALL", 0)
    sloping = tight = 0
    for seed in range(300):
        rng = random.Random(f"bounds {seed}")
        problem = random_problem(rng, chains=seed % 2 == 1)
        judge = every(problem)
        problem = limited(rng, problem, judge)
        found = solve(problem, gap=rng.choice([0.0, 0.3]))
        if not isinstance(found, Solution):
            continue
        cost = problem.time_weight * judge.time_us + problem.variance_weight * judge.variance
        for budget in np.unique(judge.peak).tolist():
            best = cost[judge.allowed(replace(problem, budget=budget))].min(initial=np.inf)
            for bound in found.bounds:
                assert bound.at(budget) <= best * (1 + 1e-6), seed
                slopes = 0 < bound.slope < np.inf and bound.at(budget) > 0 and budget != problem.budget
                sloping += slopes
                tight += slopes and bound.at(budget) > 0.99 * best
    assert sloping > 100 and tight > 10


def test_a_bound_that_cancels_is_rounded_down() -> None:
    """Of 2.35e5 nothing is left; nine digits of it are no proof."""
    bound = Bound(44_750_000, 235034.39238181285, 0.23503439238181165)
    assert bound.at(45_750_000) == 0.0
    assert bound.at(44_750_000) == pytest.approx(bound.value, rel=1e-8) and bound.at(44_750_000) < bound.value


def test_a_larger_budget_never_costs_more() -> None:
    for seed in range(60):
        problem = random_problem(random.Random(f"monotone {seed}"), 6)
        last = np.inf
        for budget in np.unique(every(problem).peak)[:12].tolist():
            found = solve(replace(problem, budget=budget), gap=0.0)
            assert isinstance(found, Solution)
            assert found.evaluation.cost <= last * (1 + 1e-6)
            last = found.evaluation.cost


def test_ties_go_to_less_variance_then_to_fewer_bytes() -> None:
    stores = (
        Store(100, 1.0, 0.3, "a"),
        Store(90, 1.0, 0.2, "b"),
        Store(60, 1.0, 0.2, "c"),
        Store(10, 1.0, 0.4, "d"),
    )
    values = tuple(Candidate(f"v{i}", 1000, 0, 0, (1,), stores) for i in range(3))
    found = solve(Problem(1, (0, 0), values, budget=3300), gap=0.0)
    assert isinstance(found, Solution) and found.decision == (2, 2, 2)
    free = tuple(replace(v, rebuild=Rebuild(0.0)) for v in values)
    found = solve(Problem(1, (0, 0), tuple(replace(v, stores=(Store(1000),)) for v in free)), gap=0.0)
    assert isinstance(found, Solution) and found.evaluation.saved_bytes == 0


def test_one_byte_of_a_hundred_gigabytes_counts() -> None:
    """HiGHS takes a millionth for nothing; that is over a megabyte here."""
    sizes = [10**10 + 7 * i for i in range(6)]
    stores = [(Store(n), Store(n - 3, 1.0 + i, 0.0, "c")) for i, n in enumerate(sizes)]
    values = tuple(Candidate(f"v{i}", n, 0, 0, (1,), stores[i]) for i, n in enumerate(sizes))
    # in the forward an encoded value counts twice; the base makes the backward the tight place
    problem = Problem(1, (0, 10**12), values)
    kept = sum(sizes) + 10**12
    for less, cost in ((0, 0.0), (1, 1.0), (3, 1.0), (4, 3.0), (6, 3.0), (7, 6.0)):
        found = solve(replace(problem, budget=kept - less), gap=0.0)
        assert isinstance(found, Solution) and found.evaluation.cost == cost
    too_small = solve(replace(problem, budget=kept - 19), gap=0.0)
    assert isinstance(too_small, Infeasible) and too_small.proved
    assert too_small.smallest == too_small.bound == kept - 18


def test_the_least_error_for_a_byte_target_is_what_assign_finds() -> None:
    rng = random.Random(5)
    options = []
    for _ in range(40):
        size = rng.randint(1, 10**7)
        options.append(
            [
                Option(None, size, 0.0, 0.0),
                Option("int8", size // 2, rng.uniform(1e-6, 1e-4), rng.uniform(0, 100)),
                Option("int4", size // 4, rng.uniform(1e-3, 1e-2), rng.uniform(0, 100)),
            ]
        )
    values = tuple(
        Candidate(
            f"v{i}",
            group[0].nbytes,
            0,
            0,
            (1,),
            tuple(Store(o.nbytes, o.time_us, o.variance, o.codec) for o in group),
        )
        for i, group in enumerate(options)
    )
    for ratio in (1.5, 2.5, 3.5):
        target = int(sum(group[0].nbytes for group in options) / ratio)
        problem = Problem(1, (0, 0), values, max_saved=target, time_weight=1e-8, variance_weight=1.0)
        found, old = solve(problem, gap=1e-4), assign(options, target)
        assert isinstance(found, Solution) and old.reached
        theirs = evaluate(problem, old.choice)
        assert found.evaluation.cost <= theirs.cost * (1 + 1e-4)
        assert found.evaluation.saved_bytes <= target


def test_nothing_to_decide() -> None:
    found = solve(Problem(1, (5, 6), (), budget=6))
    assert isinstance(found, Solution) and found.decision == () and found.gap == 0.0
    found = solve(Problem(1, (5, 6), (), budget=5))
    assert isinstance(found, Infeasible) and (found.smallest, found.bound, found.step) == (6, 6, 1)


def test_infeasible_names_what_is_alive_and_cannot_be_smaller() -> None:
    stuck = Candidate("stuck", 100, 0, 0, (2,), (Store(100),))
    soft = Candidate("soft", 50, 0, 0, (2,), (Store(50), Store(20, 1.0, 0.1, "int8")))
    found = solve(Problem(1, (0, 0, 30), (stuck, soft), budget=149), gap=0.0)
    assert isinstance(found, Infeasible) and found.limit == "budget" and found.proved
    # the forward holds both values and, if encoded, the payload as well
    assert (found.smallest, found.bound, found.step) == (170, 170, 0)
    assert found.live == (Live(0, 100, 100), Live(1, 70, 50))


def test_a_budget_no_schedule_can_meet_is_proved_so() -> None:
    problem = layered(12, 0.8)
    found = solve(replace(problem, budget=2**32))
    assert isinstance(found, Infeasible) and found.proved and found.smallest is not None
    assert 2**32 < found.bound <= found.smallest
    again = solve(replace(problem, budget=int(found.smallest)), starts=[found.decision or ()])
    assert isinstance(again, Solution)


def test_an_error_cap_that_cannot_be_met() -> None:
    value = Candidate("v", 100, 0, 0, (1,), (Store(50, 1.0, 0.2, "int8"), Store(25, 1.0, 0.4, "int4")))
    found = solve(Problem(1, (0, 0), (value,), max_variance=0.1), gap=0.0)
    assert isinstance(found, Infeasible) and found.limit == "variance" and found.proved
    assert found.smallest == pytest.approx(0.2)


@pytest.mark.parametrize("grads", [0.0, 0.25, 0.8])
def test_layered_problems_are_near_their_bound(grads: float) -> None:
    problem = replace(layered(48, grads, noise=0.1), variance_weight=1e6)
    for budget in budgets(problem, (0.05, 0.3, 0.6, 0.9)):
        found = solve(replace(problem, budget=budget))
        assert isinstance(found, Solution)
        assert found.evaluation.peak_bytes <= budget
        assert found.gap <= 0.005


def test_a_start_is_never_lost() -> None:
    problem = replace(layered(12), variance_weight=1e6)
    (budget,) = budgets(problem, (0.3,))
    first = solve(replace(problem, budget=budget), gap=0.0, deadline_s=5)
    assert isinstance(first, Solution)
    again = solve(replace(problem, budget=budget), gap=0.1, starts=[first.decision])
    assert isinstance(again, Solution) and again.evaluation.cost <= first.evaluation.cost


def hard() -> Problem:
    """Nothing but recomputing, through chains as long as the model; far from solved in a second."""
    problem = layered(48)
    kept_only = tuple(replace(c, stores=c.stores[:1]) for c in problem.candidates)
    problem = replace(problem, candidates=kept_only)
    peak = evaluate(problem, (0,) * len(kept_only)).peak_bytes
    return replace(problem, budget=int(0.3 * peak))


def test_at_the_deadline_the_best_so_far_is_returned_with_its_gap() -> None:
    start = time.perf_counter()
    found = solve(hard(), deadline_s=2.0, gap=0.0)
    assert time.perf_counter() - start < 4.0
    assert isinstance(found, Solution)
    assert found.evaluation.feasible and 0.0 < found.gap <= 1.0
    assert found.bound <= found.evaluation.cost


def test_prices_of_memory() -> None:
    values = tuple(
        Candidate(f"v{i}", 100, 0, 0, (1,), (Store(100),), Rebuild(10.0 * (i + 1))) for i in range(4)
    )
    problem = Problem(1, (0, 0, 0), tuple(replace(v, reads=(1 + (i > 1),)) for i, v in enumerate(values)))
    # step 0 holds all four; rebuilt ones are back at 1 (two) and 2 (two)
    problem = replace(problem, budget=400, base=(0, 100, 100))
    found = solve(problem, gap=0.0)
    assert isinstance(found, Solution) and found.evaluation.cost == 30.0
    price = prices(problem, found, step_bytes=100, gap=0.0)
    assert (price.more_saves, price.less_costs) == (30.0, None)
    assert prices(problem, found).step_bytes == 40
    with pytest.raises(ValueError, match="no price"):
        prices(replace(problem, budget=None), found)


FINGERPRINT = """
import random
from dataclasses import replace
from tests.planner.test_solve import fingerprint
print(fingerprint())
"""


def fingerprint() -> str:
    """Hash of what is found for a few small problems and a layered one."""
    found: list[object] = []
    for seed in range(40):
        problem = random_problem(random.Random(f"hash {seed}"))
        for budget in np.unique(every(problem).peak)[:3].tolist():
            got = solve(replace(problem, budget=budget - 1), gap=0.0)
            found.append((got.decision, got.bound, got.rounds))
    problem = replace(layered(24, 0.25, noise=0.1), variance_weight=1e6)
    for budget in budgets(problem, (0.05, 0.5)):
        got = solve(replace(problem, budget=budget), deadline_s=60)
        found.append((got.decision, got.bound, got.rounds))
    return hashlib.sha256(repr(found).encode()).hexdigest()


@pytest.mark.slow
def test_hash_seeds_change_nothing() -> None:
    seen = set()
    for seed in ("0", "1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            [sys.executable, "-c", FINGERPRINT], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        )
        seen.add(result.stdout.strip().splitlines()[-1])
    assert len(seen) == 1


def test_a_wrong_proof_of_the_solver_is_no_bound() -> None:
    """HiGHS's presolve calls this feasible program infeasible; the search for the least peak refutes it."""
    s, c = Store, Candidate
    candidates = (
        c("v0", 16000000, 2, 3, (), (s(8000000, 0.04, 1e-4, "int8"),), Rebuild(0.0)),
        c("v1", 6000000, 2, 3, (), (s(6000000),), Rebuild(3.9, (0,)), True),
        c("v2", 7778242, 0, 0, (), (), Rebuild(0.87, (0, 1)), True),
        c("v3", 7000000, 2, 2, (), (), Rebuild(3.6, (0, 2)), True),
        c(
            "v4", 17107136, 2, 2, (5,),
            (s(17107136), s(8553568, 0.0, 1e-4, "int8"), s(8553568, 0.014, 0.56, "int4")),
            Rebuild(3.9, (2, 3)), True,
        ),
    )  # fmt: skip
    base = (0, 0, 6000000, 0, 107770756, 107770756, 107770756)
    found = solve(Problem(4, base, candidates, budget=116324323), gap=0.0)
    assert isinstance(found, Solution) and found.evaluation.feasible
    assert found.bound <= found.evaluation.cost
