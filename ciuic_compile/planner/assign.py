"""Which codec for which storage: a multiple-choice knapsack.

Sizes are usually multiples of a large number; then dynamic programming over the bytes (Dudzinski and
Walukiewicz, EJOR 28, 1987) is exact, in milliseconds. Branch and bound, by HiGHS through scipy, takes seconds
to minutes for many nearly equal layers; it is for what that leaves: sizes without a common unit, and limits
on the error that the optimum without them breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import coo_array

from .highs import quiet_milp

#: Entries of the table that dynamic programming may fill: a byte each.
_TABLE = 2**26


@dataclass(frozen=True)
class Option:
    """One way to store one storage.

    Attributes:
        codec: codec name, or None to keep it as it is.
        nbytes: bytes between forward and backward.
        variance: what it adds to the mean relative variance of the gradients.
        time_us: what it adds to a step, in microseconds.
    """

    codec: str | None
    nbytes: int
    variance: float
    time_us: float


@dataclass(frozen=True)
class Assignment:
    """One option a storage, with the optimiser's certificate.

    Attributes:
        choice: index of the chosen option, one a storage.
        reached: whether the byte target holds; when it cannot, the fewest bytes are chosen instead.
        lower_bound: dual bound on what was minimised: the error, or the bytes where ``reached`` is False.
        gap: ``(value - lower_bound) / value`` of what was minimised, 0.0 when proved optimal.
    """

    choice: tuple[int, ...]
    reached: bool
    lower_bound: float
    gap: float


def assign(
    options: Sequence[Sequence[Option]], target_bytes: int, max_variance: float | None = None
) -> Assignment:
    """Least-error choice of one option per storage whose bytes add up to at most ``target_bytes``.

    When even the smallest options exceed the target, or ``max_variance`` stands in the way, the plan
    with the fewest bytes (within ``max_variance``) is returned with ``reached=False``.
    """
    cheapest = _table(options, target_bytes)
    if cheapest is not None and (max_variance is None or _variance(options, cheapest) <= max_variance):
        return Assignment(cheapest, True, _cost(options, cheapest), 0.0)
    flat = [o for group in options for o in group]
    size = np.array([o.nbytes for o in flat], dtype=float)
    variance = np.array([o.variance for o in flat])
    # Time only breaks ties: a microsecond weighs as much as a millionth of an INT4 tensor's variance.
    cost = variance + np.array([o.time_us for o in flat]) * 1e-8
    limits = [(variance, max_variance)] if max_variance is not None else []
    bound = 0.0
    for slack in (0.0, 2e-6):  # HiGHS may exceed a limit by a millionth of it: then ask for less
        solved = _solve(options, cost, [*limits, (size, target_bytes * (1 - slack))])
        if solved is None:
            break
        choice, dual = solved
        bound = dual if slack == 0.0 else bound  # less than asked for would not bound what was asked for
        if _total(options, choice) <= target_bytes:
            return Assignment(choice, True, bound, _gap(_cost(options, choice), bound))
    least_cost = bound  # no choice within the target costs less; 0.0 where nothing was proved
    if max_variance is None:  # then each storage takes its own fewest bytes
        choice = tuple(
            list(group).index(min(group, key=lambda o: (o.nbytes, o.variance, o.time_us)))
            for group in options
        )
        bound = float(_total(options, choice))
    else:
        ties = cost / max(float(cost.max()), 1e-30) * 1e-6
        smallest = _solve(options, size / max(float(size.max()), 1.0) + ties, limits)
        assert smallest is not None, "keeping everything has no error, so this is always feasible"
        choice, bound = smallest[0], smallest[1] * max(float(size.max()), 1.0)
    total = _total(options, choice)
    if total <= target_bytes:  # HiGHS's tolerance was wider than the room between this choice and the target
        return Assignment(choice, True, least_cost, _gap(_cost(options, choice), least_cost))
    return Assignment(choice, False, bound, _gap(float(total), bound))


def _total(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> int:
    return sum(group[i].nbytes for group, i in zip(options, choice, strict=True))


def _cost(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> float:
    return sum(group[i].variance + group[i].time_us * 1e-8 for group, i in zip(options, choice, strict=True))


def _variance(options: Sequence[Sequence[Option]], choice: Sequence[int]) -> float:
    return sum(group[i].variance for group, i in zip(options, choice, strict=True))


def _table(options: Sequence[Sequence[Option]], target_bytes: int) -> tuple[int, ...] | None:
    """The cheapest choice within a byte target; None where there is none, or the table would be too large.

    Entry ``u`` of ``cost`` is the least that the groups so far cost where they take at most ``u`` units more
    than their fewest bytes.
    """
    fewest = [min(o.nbytes for o in group) for group in options]
    more = [[o.nbytes - least for o in group] for group, least in zip(options, fewest, strict=True)]
    unit = gcd(*(n for group in more for n in group)) or 1
    room = min(target_bytes - sum(fewest), sum(map(max, more))) // unit
    if room < 0 or (room + 1) * len(options) > _TABLE:
        return None
    cost = np.zeros(room + 1)
    chosen = np.zeros((len(options), room + 1), dtype=np.uint8)
    for row, group, sizes in zip(chosen, options, more, strict=True):
        before, cost = cost, np.full(room + 1, inf)
        for index, (option, size) in enumerate(zip(group, sizes, strict=True)):
            used = size // unit
            if used <= room:
                with_it = before[: room + 1 - used] + (option.variance + option.time_us * 1e-8)
                better = with_it < cost[used:]
                cost[used:][better] = with_it[better]
                row[used:][better] = index
    choice, left = [], room
    for row, sizes in zip(chosen[::-1], more[::-1], strict=True):
        choice.append(int(row[left]))
        left -= sizes[choice[-1]] // unit
    return tuple(reversed(choice))


def _gap(value: float, bound: float) -> float:
    return max(0.0, (value - bound) / value) if value > 0 else 0.0


def _solve(
    options: Sequence[Sequence[Option]], cost: np.ndarray, limits: Sequence[tuple[np.ndarray, float]]
) -> tuple[tuple[int, ...], float] | None:
    """Choice and dual bound; None when infeasible."""
    if not options:
        return (), 0.0
    sizes = [len(group) for group in options]
    group_of = np.repeat(np.arange(len(options)), sizes)
    ones = coo_array((np.ones(len(cost)), (group_of, np.arange(len(cost)))))
    constraints = [LinearConstraint(ones, 1, 1)]
    usable = np.ones(len(cost), dtype=bool)
    for row, bound in limits:
        usable &= row <= bound  # what alone exceeds a limit is left out, so that no coefficient is huge
        scaled = np.where(row <= bound, row, 0.0) / (bound if bound > 0 else 1.0)
        constraints.append(LinearConstraint(scaled[None, :], -np.inf, 1.0 if bound > 0 else 0.0))
    scale = max(float(np.abs(cost).max()), 1e-30)
    result = quiet_milp(
        cost / scale,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, usable.astype(float)),
        constraints=constraints,
        options={"mip_rel_gap": 1e-3, "time_limit": 10.0},
    )
    if result.x is None:
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)])
    choice = tuple(int(np.argmax(result.x[a:b])) for a, b in pairwise(starts))
    return choice, float(result.mip_dual_bound) * scale
