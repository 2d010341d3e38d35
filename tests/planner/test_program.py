"""The simulator: by hand, and against an enumeration that was written apart from it."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from bench.plan_time import layered
from ciuic_compile.planner.program import (
    ABSENT,
    Candidate,
    Problem,
    Rebuild,
    Store,
    evaluate,
    live_at,
    needs,
    tidy,
)
from tests.planner.planning import every, random_problem

INT8 = Store(40, 2.0, 0.5, "int8", unpacked=True)
PACKED = Store(40, 2.0, 0.5, "int4", unpacked=False)


def live(problem: Problem, *decision: int) -> list[int]:
    """Bytes at each step, 3 forward and 4 backward ones."""
    return evaluate(problem, decision).live_bytes.tolist()


def one(*stores: Store, reads: tuple[int, ...] = (4, 6), fused: bool = False) -> Problem:
    """One value of 100 bytes, written at step 0 and read at step 1 of the forward's 0, 1, 2."""
    value = Candidate("v", 100, 0, 1, reads, stores, Rebuild(5.0), fused)
    return Problem(3, (0,) * 7, (value,))


def test_a_kept_value_lives_to_its_last_need() -> None:
    assert live(one(Store(100)), 0) == [100, 100, 100, 100, 100, 100, 100]
    assert live(one(Store(100), reads=(4,)), 0) == [100, 100, 100, 100, 100, 0, 0]


def test_an_encoded_value_is_decoded_at_its_first_need() -> None:
    assert live(one(INT8), 0) == [100, 140, 40, 40, 140, 100, 100]


def test_readers_that_decode_for_themselves_need_the_payload_to_the_end() -> None:
    assert live(one(PACKED), 0) == [100, 140, 40, 40, 40, 40, 40]


def test_a_rebuilt_value_lives_from_its_first_to_its_last_need() -> None:
    assert live(one(), ABSENT) == [100, 100, 0, 0, 100, 100, 100]
    assert evaluate(one(), (ABSENT,)).time_us == 5.0


def test_a_fused_value_takes_memory_only_when_it_is_stored() -> None:
    assert live(one(Store(100), fused=True), ABSENT) == [0] * 7
    assert live(one(Store(100), fused=True), 0) == [100] * 7


def test_what_nothing_needs_is_dropped_and_costs_nothing() -> None:
    found = evaluate(one(reads=()), (ABSENT,))
    assert found.live_bytes.tolist() == [100, 100, 0, 0, 0, 0, 0]
    assert (found.time_us, found.rebuilt, found.feasible) == (0.0, (), True)


@pytest.mark.parametrize("store", [Store(100), INT8, PACKED])
def test_what_is_stored_for_nothing_is_freed_when_the_backward_begins(store: Store) -> None:
    problem = one(store, reads=())
    assert live(problem, 0)[3:] == [0, 0, 0, 0]
    assert evaluate(problem, (0,)).saved_bytes == store.nbytes
    assert tidy(problem, (0,)) == (ABSENT,)


def chain(fused: bool) -> Problem:
    """a (encoded, read at 6) -> b (read at 4 and 5)."""
    a = Candidate("a", 100, 0, 0, (6,), (Store(100), INT8))
    b = Candidate("b", 100, 1, 1, (4, 5), (Store(100),), Rebuild(3.0, (0,)), fused)
    return Problem(3, (0,) * 7, (a, b))


def test_a_rebuild_brings_its_inputs_decoding_forward() -> None:
    assert needs(chain(False), (1, ABSENT)) == ([4, 4], [6, 5])
    assert live(chain(False), 1, ABSENT)[3:] == [40, 40 + 100 + 100, 100 + 100, 100]
    assert live(chain(False), 1, 0)[3:] == [40 + 100, 40 + 100, 40 + 100, 140]


def test_a_fused_rebuild_takes_nothing_itself() -> None:
    assert live(chain(True), 1, ABSENT)[3:] == [40, 140, 100, 100]


def test_a_fused_rebuild_needs_its_inputs_at_its_last_reader_too() -> None:
    problem = chain(True)
    a = replace(problem.candidates[0], reads=())
    problem = replace(problem, candidates=(a, problem.candidates[1]))
    assert live(problem, 1, ABSENT)[3:] == [40, 140, 100, 0]
    first_only = replace(problem, candidates=(a, replace(problem.candidates[1], fused=False)))
    assert live(first_only, 1, ABSENT)[3:] == [40, 240, 100, 0]


def test_bytes_of_each_candidate_at_a_step() -> None:
    assert live_at(chain(False), (1, ABSENT), 4) == [140, 100]


def test_a_value_that_is_needed_must_come_from_somewhere() -> None:
    problem = Problem(1, (0, 0), (Candidate("v", 8, 0, 0, (1,), (Store(8),)),))
    found = evaluate(problem, (ABSENT,))
    assert found.missing == (0,) and not found.feasible


def test_limits() -> None:
    problem = one(Store(100), INT8)
    assert evaluate(replace(problem, budget=140), (1,)).feasible
    assert not evaluate(replace(problem, budget=139), (1,)).feasible
    assert not evaluate(replace(problem, max_saved=39), (1,)).feasible
    assert not evaluate(replace(problem, max_saved=40, fixed_saved=1), (1,)).feasible
    assert evaluate(replace(problem, max_variance=0.5), (1,)).feasible
    assert not evaluate(replace(problem, max_variance=0.49), (1,)).feasible
    weighted = replace(problem, time_weight=2.0, variance_weight=10.0)
    assert evaluate(weighted, (1,)).cost == 2.0 * 2.0 + 10.0 * 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": -1}, "size -1"),
        ({"last_use": 3}, "steps 0..3 of 3"),
        ({"reads": (2,)}, "outside the backward"),
        ({"rebuild": Rebuild(1.0, (0,))}, "later candidates"),
        ({"rebuild": Rebuild(-1.0)}, "not negative"),
        ({"stores": (Store(99),)}, "its own size"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    value = one().candidates[0]
    with pytest.raises(ValueError, match=message):
        Problem(3, (0,) * 7, (replace(value, **change),))  # type: ignore[arg-type]


def test_members_of_a_group_have_the_same_options() -> None:
    a = replace(one(Store(100)).candidates[0], group="g")
    with pytest.raises(ValueError, match="group 'g'"):
        Problem(3, (0,) * 7, (a, replace(a, stores=())))


def test_a_decision_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 choices for 1"):
        evaluate(one(), (0, 0))


def test_the_simulator_agrees_with_the_enumeration() -> None:
    for seed in range(400):
        rng = random.Random(seed)
        problem = random_problem(rng)
        judge = every(problem)
        for i in rng.sample(range(len(judge.peak)), min(10, len(judge.peak))):
            found = evaluate(problem, judge.decisions[i].tolist())
            assert not found.missing
            assert found.peak_bytes == judge.peak[i] == found.live_bytes.max()
            assert found.peak_step == np.argmax(found.live_bytes)
            assert (found.saved_bytes, found.time_us) == (judge.saved[i], judge.time_us[i])
            assert found.variance == judge.variance[i]
            neat = evaluate(problem, tidy(problem, judge.decisions[i].tolist()))
            assert neat.cost <= found.cost and (neat.live_bytes <= found.live_bytes).all()


def test_another_budget_keeps_what_is_known_of_the_candidates() -> None:
    problem = layered(2)
    limited = problem.within(7)
    assert (limited.budget, limited.within(None)) == (7, problem)
    assert limited.known is problem.known and limited.readers is problem.readers
