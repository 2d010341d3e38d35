"""Which codec for which storage: a multiple-choice knapsack, solved by HiGHS through scipy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array


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
        lower_bound: dual bound on the minimised cost.
        gap: ``(cost - lower_bound) / cost``, 0.0 when proved optimal.
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
    if not options:
        return Assignment((), target_bytes >= 0, 0.0, 0.0)
    flat = [o for group in options for o in group]
    size = np.array([o.nbytes for o in flat], dtype=float)
    variance = np.array([o.variance for o in flat])
    # Time only breaks ties: a microsecond weighs as much as a millionth of an INT4 tensor's variance.
    cost = variance + np.array([o.time_us for o in flat]) * 1e-8
    limits = [(variance, max_variance)] if max_variance is not None else []
    solved = _solve(options, cost, [*limits, (size, target_bytes * (1 - 1e-6))])  # HiGHS allows 1e-7
    if solved is not None:
        return Assignment(solved[0], True, solved[1], solved[2])
    smallest = _solve(options, size / max(size.max(), 1.0) + cost * 1e-6, limits)
    assert smallest is not None, "keeping everything has no error, so this is always feasible"
    return Assignment(smallest[0], False, smallest[1], smallest[2])


def _solve(
    options: Sequence[Sequence[Option]], cost: np.ndarray, limits: Sequence[tuple[np.ndarray, float]]
) -> tuple[tuple[int, ...], float, float] | None:
    """Choice, dual bound and gap; None when infeasible."""
    sizes = [len(group) for group in options]
    group_of = np.repeat(np.arange(len(options)), sizes)
    ones = coo_array((np.ones(len(cost)), (group_of, np.arange(len(cost)))))
    constraints = [LinearConstraint(ones, 1, 1)]
    for row, bound in limits:
        scale = max(abs(bound), 1e-30)
        constraints.append(LinearConstraint(row[None, :] / scale, -np.inf, bound / scale))
    scale = max(float(np.abs(cost).max()), 1e-30)
    result = milp(
        cost / scale,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 1e-3, "time_limit": 10.0},
    )
    if result.x is None:
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)])
    choice = tuple(int(np.argmax(result.x[a:b])) for a, b in pairwise(starts))
    value = float(sum(cost[a + c] for a, c in zip(starts, choice, strict=False)))
    bound = float(result.mip_dual_bound) * scale
    gap = max(0.0, (value - bound) / value) if value > 0 else 0.0
    return choice, bound, gap
