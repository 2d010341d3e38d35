"""The codec knapsack against brute force: optimal, certified, and never over what it was given."""

from __future__ import annotations

import random
import sys
from itertools import product

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ciuic_compile.planner.assign import Assignment, Option, assign

KEEP = 64


def cost(options: list[list[Option]], choice: tuple[int, ...]) -> float:
    """What ``assign`` minimises: variance, and time as a tie-breaker."""
    return sum(o[c].variance + o[c].time_us * 1e-8 for o, c in zip(options, choice, strict=True))


def nbytes(options: list[list[Option]], choice: tuple[int, ...]) -> int:
    """Bytes of a choice."""
    return sum(o[c].nbytes for o, c in zip(options, choice, strict=True))


def variance(options: list[list[Option]], choice: tuple[int, ...]) -> float:
    """Variance of a choice."""
    return sum(o[c].variance for o, c in zip(options, choice, strict=True))


@st.composite
def problems(draw: st.DrawFn) -> list[list[Option]]:
    """Up to five storages; the first option of each keeps it, the others are smaller and not exact."""
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        size = draw(st.integers(1, 10**6))
        group = [Option(None, size, 0.0, 0.0)]
        for name in ("int8", "int4")[: draw(st.integers(0, 2))]:
            small = draw(st.integers(0, size))
            error = draw(st.floats(1e-6, 1.0))
            group.append(Option(name, small, error, draw(st.floats(0, 1000))))
        groups.append(group)
    return groups


def every(options: list[list[Option]]) -> list[tuple[int, ...]]:
    """All choices."""
    return list(product(*(range(len(o)) for o in options)))


def check(options: list[list[Option]], target: int, limit: float | None, got: Assignment) -> None:
    """Compare with all choices."""
    allowed = [c for c in every(options) if limit is None or variance(options, c) <= limit]
    fitting = [c for c in allowed if nbytes(options, c) <= target]
    assert got.choice in every(options)
    if limit is not None:
        assert variance(options, got.choice) <= limit * (1 + 1e-6)  # HiGHS's tolerance
    assert got.reached is bool(fitting)
    if not fitting:
        fewest = min(nbytes(options, c) for c in allowed)
        slack = (
            0 if limit is None else 1e-3 * fewest + 2e-6 * max(o.nbytes for group in options for o in group)
        )
        assert fewest <= nbytes(options, got.choice) <= fewest + slack
        assert got.lower_bound <= fewest + slack and 0 <= got.gap <= 1
        return
    assert nbytes(options, got.choice) <= target
    best = min(cost(options, c) for c in fitting)
    value = cost(options, got.choice)
    largest = max(o.variance + o.time_us * 1e-8 for group in options for o in group)
    slack = 2e-6 * largest  # HiGHS's absolute tolerance, on costs scaled to one
    assert best - slack <= value <= best * (1 + 1e-3) + slack, "optimal up to the gap asked for"
    assert got.lower_bound <= best + slack, "a true bound"
    assert 0 <= got.gap <= 1
    if value > 0:
        assert got.gap == pytest.approx(max(0.0, (value - got.lower_bound) / value))


@settings(max_examples=150, deadline=None)
@given(problems(), st.data())
def test_against_brute_force(options: list[list[Option]], data: st.DataObject) -> None:
    total = nbytes(options, (0,) * len(options))
    exact = data.draw(st.booleans(), label="exactly what one choice takes")
    sizes = sorted({nbytes(options, c) for c in every(options)})
    target = data.draw(st.sampled_from(sizes) if exact else st.integers(0, total + 1), label="target")
    check(options, target, None, assign(options, target))


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_against_brute_force_under_a_variance_cap(options: list[list[Option]], data: st.DataObject) -> None:
    total = nbytes(options, (0,) * len(options))
    target = data.draw(st.integers(0, total + 1), label="target")
    whole = sorted({variance(options, c) for c in every(options)})
    # between two possible sums, so that rounding cannot decide
    at = data.draw(st.integers(0, len(whole) - 1), label="cap")
    limit = whole[at] * 1.01 + 1e-9
    if any(limit < v <= limit * (1 + 1e-5) for v in whole):
        return
    check(options, target, limit, assign(options, target, limit))


def test_room_within_the_solvers_tolerance_still_gives_a_true_bound() -> None:
    """Two bytes of a million: HiGHS takes one choice too many to fit, and none a little below."""
    options = [[Option(None, size, 0.0, 0.0)] for size in (1, 1, 999_999)]
    options.append([Option(None, 1, 0.0, 0.0), Option("int8", 0, 1.0, 0.0)])
    check(options, 1_000_001, None, assign(options, 1_000_001))


def test_a_target_that_keeping_meets_exactly_compresses_nothing() -> None:
    """Mode "1:1" where the cut saves what Inductor saves: nothing has to give."""
    options = [[Option(None, KEEP, 0.0, 0.0), Option("int8", KEEP // 2, 1e-5, 1.0)] for _ in range(3)]
    got = assign(options, 3 * KEEP)
    assert (got.choice, got.reached) == ((0, 0, 0), True)
    got = assign(options, 3 * KEEP - 1)
    assert sorted(got.choice) == [0, 0, 1] and got.reached


@pytest.mark.parametrize("unit", [1, 2**10, 2**30, 2**36])
def test_never_over_the_target_at_any_scale(unit: int) -> None:
    generator = random.Random(unit)
    for _ in range(5):
        options = [
            [
                Option(None, 16 * size, 0.0, 0.0),
                Option("int8", 8 * size + 1, generator.uniform(1e-6, 1e-4), 1.0),
                Option("int4", 4 * size + 1, generator.uniform(1e-4, 1e-2), 1.0),
            ]
            for size in (generator.randint(1, 100) * unit for _ in range(12))
        ]
        total = nbytes(options, (0,) * 12)
        target = generator.randint(total // 4 + 13, total)
        got = assign(options, target)
        assert got.reached and nbytes(options, got.choice) <= target


def test_many_storages_are_solved_within_the_gap() -> None:
    generator = random.Random(0)
    options = []
    for _ in range(400):
        size = generator.choice([1, 4, 16]) * 2**20
        scale = generator.uniform(0.1, 3.0)
        options.append(
            [
                Option(None, size, 0.0, 0.0),
                Option("int8", size // 2 + size // 32, 3e-5 * scale, 2.0),
                Option("int4", size // 4 + size // 32, 8e-3 * scale, 1.5),
            ]
        )
    target = nbytes(options, (0,) * 400) // 3
    got = assign(options, target)
    assert got.reached and nbytes(options, got.choice) <= target
    assert got.gap <= 1.1e-3
    assert got.lower_bound <= cost(options, got.choice)


def test_infeasible_takes_the_fewest_bytes_within_the_cap() -> None:
    options = [[Option(None, 100, 0.0, 0.0), Option("int8", 50, 0.01, 1.0), Option("int4", 25, 0.5, 1.0)]] * 2
    got = assign(options, 10)
    assert (got.choice, got.reached) == ((2, 2), False)
    got = assign(options, 10, max_variance=0.1)
    assert (got.choice, got.reached) == ((1, 1), False)
    got = assign(options, 10, max_variance=0.015)
    assert sorted(got.choice) == [0, 1] and not got.reached


@example(sizes=[10**12, 1], errors=[1e6, 1e-6])
@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**12), min_size=1, max_size=4),
    errors=st.lists(st.floats(1e-12, 1e6), min_size=4, max_size=4),
)
def test_target_zero_takes_every_codec(sizes: list[int], errors: list[float]) -> None:
    """As mode "lossless" asks for it, whatever the sizes and errors."""
    options = [
        [Option(None, 2 * s, 0.0, 0.0), Option("c", s, e, 1.0)] for s, e in zip(sizes, errors, strict=False)
    ]
    got = assign(options, 0)
    assert got.choice == (1,) * len(sizes) and not got.reached


def test_nothing_to_choose() -> None:
    assert assign([], 0) == Assignment((), True, 0.0, 0.0)
    empty = [[Option(None, 0, 0.0, 0.0)]]
    assert assign(empty, 0).choice == (0,)
    assert assign(empty, 0).reached
    one = assign([[Option(None, 5, 0.0, 0.0)]], 4)
    assert (one.choice, one.reached) == ((0,), False)


def test_time_only_breaks_ties() -> None:
    options = [
        [Option(None, 100, 0.0, 0.0), Option("slow", 50, 1e-3, 9.0), Option("fast", 50, 1e-3, 1.0)],
    ]
    assert assign(options, 60).choice == (2,)
    options = [
        [Option(None, 100, 0.0, 0.0), Option("slow", 50, 1e-3, 900.0), Option("fast", 50, 2e-3, 1.0)],
    ]
    assert assign(options, 60).choice == (1,)


def test_many_nearly_equal_layers_need_no_branch_and_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Branch and bound took 8 s of such a problem, and with another clock another plan came out."""
    monkeypatch.setattr(sys.modules[assign.__module__], "quiet_milp", None)
    layer = [("int8", 33, 3e-5), ("int6", 25, 6e-4), ("int5", 21, 2.5e-3), ("int4", 18, 8e-3)]
    options = [
        [Option(None, 128 * 8192, 0.0, 0.0)]
        + [Option(name, units * 8192, error * (1 + i % 17 / 100), 1.0) for name, units, error in layer]
        for i in range(240)
    ]
    target = 240 * 23 * 8192 + 5
    got = assign(options, target)
    assert got.reached and nbytes(options, got.choice) <= target
    assert got.gap == 0.0 and got.lower_bound == cost(options, got.choice)
    # Lagrange's bound, at several prices of a byte
    prices = [1.9e-3 / 4 / 8192 * (1 + step / 50) for step in range(-10, 11)]
    bound = max(
        sum(min(o.variance + o.time_us * 1e-8 + price * o.nbytes for o in group) for group in options)
        - price * target
        for price in prices
    )
    assert bound <= got.lower_bound <= bound * 1.01
