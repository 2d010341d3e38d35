"""What greedy moves leave untried is worth nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

import numpy as np

from bench.plan_time import budgets, layered
from ciuic_compile.planner.descent import SINGLES, Effort, descend, moves_of
from ciuic_compile.planner.program import ABSENT, Problem, evaluate
from ciuic_compile.planner.screen import Level, Screen, tops
from ciuic_compile.planner.state import State
from tests.planner.planning import random_problem


def limited(rng: random.Random, problem: Problem, decision: list[int]) -> Problem:
    """With limits that the decision keeps, just keeps or breaks."""
    found = evaluate(problem, decision)
    budget = int(found.peak_bytes * rng.choice([0.6, 0.9, 1.0, 1.0, 1.1]))
    saved = int(found.saved_bytes * rng.choice([0.8, 1.0, 1.2])) if rng.random() < 0.3 else None
    variance = found.variance * rng.choice([0.5, 1.0, 2.0]) if rng.random() < 0.3 else None
    return replace(
        problem, budget=None if rng.random() < 0.1 else budget, max_saved=saved, max_variance=variance
    )


def test_what_is_screened_out_is_worth_nothing() -> None:
    rng = random.Random(11)
    kept = dropped = 0
    for trial in range(1500):
        problem = random_problem(rng, largest=12, chains=trial % 2 == 0)
        candidates = problem.candidates
        # Grouped at random: moves of several candidates, of which one may be rebuilt from another.
        shapes = [(len(c.stores), c.rebuild is not None, bool(c.reads)) for c in candidates]
        problem = replace(
            problem,
            candidates=tuple(replace(c, group=str(s)) for c, s in zip(candidates, shapes, strict=True)),
        )
        choices = [[*range(len(c.stores)), *([ABSENT] if c.rebuild else [])] or [ABSENT] for c in candidates]
        decision = [rng.choice(each) for each in choices]
        if evaluate(problem, decision).missing:
            continue
        problem = limited(rng, problem, decision)
        state = State(problem, decision)
        screen = Screen(problem)
        before, over = state.cost(), state.excess()
        for moves in moves_of(problem):
            hopeful = set(screen.hopeful(state, Level.of(moves)))
            kept += len(hopeful)
            for index in set(range(len(moves))) - hopeful:
                dropped += 1
                undo = state.change(*moves[index])
                cost, excess = state.cost(), state.excess()
                if undo.before and cost < inf:
                    better = (
                        excess < over * (1 - 1e-12)
                        if over > 0
                        else excess == 0 and cost < before * (1 - 1e-9)
                    )
                    assert not better, (trial, moves[index])
                state.undo(undo)
    assert dropped > kept > 1000  # most of them


def test_a_deep_model_comes_within_its_budget_for_little_work() -> None:
    """Single moves in the order of what they seem to be worth: not each is tried before the first is made."""
    problem = layered(100)
    start = tuple(0 for _ in problem.candidates)
    limited = replace(problem, budget=budgets(problem, (0.5,))[0])
    choices = sum(len(moves) for moves in moves_of(problem)[SINGLES])
    found = evaluate(limited, descend(limited, start, Effort(2 * choices), SINGLES))
    assert found.feasible


def test_the_most_of_each_stretch() -> None:
    rng = np.random.default_rng(3)
    for count in (1, 2, 7, 64, 100):
        values = rng.integers(-50, 50, count)
        starts = rng.integers(0, count, 60)
        stops = np.array([rng.integers(a, count + 1) for a in starts])
        for a, b, found in zip(starts, stops, tops(values, starts, stops), strict=True):
            assert found == values[a:b].max() if a < b else found < -(2**60)
