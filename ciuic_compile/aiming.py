"""What is planned next under a budget, when Inductor's schedule needed something else than was simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Plans made while none is over the budget.
_ROUNDS = 3
#: How far replayed and simulated peak may lie apart without planning again, as a share of the budget.
_DRIFT = 0.01
#: What a plan may leave of the budget where another was over it, and plans made between the two.
_ROOM, _BETWEEN = 0.03, 2
#: By how much lower than the last schedule asks for a plan is aimed, as a share of the budget, after so many
#: were over it. Under all of it there is no plan: then the smallest is asked for.
_MARGINS = (0.0, 0.0, 0.03, 0.1, 1.0)


@dataclass(frozen=True)
class Aim:
    """What is asked of the planner.

    Attributes:
        correction: bytes taken off the budget, for what a schedule needs beyond the simulated peak.
        kind: the cheapest plan within that, the mode's own plan only, or the smallest that there is.
        between: a plan that was over the budget and one that leaves much of it.
    """

    correction: int = 0
    kind: Literal["budget", "own", "smallest"] = "budget"
    between: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of an aim.

    Attributes:
        peak: replayed, in bytes; None where there was no plan.
        drift: replayed over simulated peak, in bytes.
        smallest: the smallest simulated peak, where there was no plan.
        tightened: whether the budget made the plan what it is.
    """

    aim: Aim
    peak: int | None = None
    drift: int = 0
    smallest: int | None = None
    tightened: bool = True


def next_aim(budget: int, outcomes: Sequence[Outcome]) -> Aim | None:
    """What to try after these; None where nothing is left to try, or the best that fits is good enough."""
    last, planned = outcomes[-1], [o for o in outcomes if o.peak is not None]
    if any(_fits(o, budget) for o in planned):
        return _nearer(budget, outcomes)
    over = [o for o in planned if o.aim.kind == "budget"]
    floor = next((o.smallest for o in outcomes if o.smallest is not None), None)
    if last.aim.kind == "smallest":
        return None
    if last.aim.kind == "budget" and not planned:
        return Aim() if last.aim.correction else None  # another schedule's need may be more than this one's
    if last in over:
        asked = last.drift + int(budget * _MARGINS[min(len(over), len(_MARGINS) - 1)])
        most = max(o.aim.correction for o in over)
        return Aim(asked if asked > most else most + int(budget * _DRIFT))
    if all(o.aim.kind != "own" for o in outcomes):
        return Aim(kind="own")  # corrections of others may be too large for it
    return Aim() if floor is None else Aim(budget - floor, "smallest")


def _nearer(budget: int, outcomes: Sequence[Outcome]) -> Aim | None:
    """Closer to the budget than what fits, if that is worth another plan."""
    last, planned = outcomes[-1], [o for o in outcomes if o.peak is not None]
    fitting = [o for o in planned if _fits(o, budget)]
    if any(o.aim.kind == "own" or not o.tightened for o in fitting):
        return None
    closest = min(fitting, key=lambda o: o.aim.correction)
    high = closest.aim.correction
    over = [o.aim.correction for o in planned if not _fits(o, budget) and o.aim.kind == "budget"]
    low = max((c for c in over if c < high), default=None)
    if low is None:
        expected = abs(last.drift - last.aim.correction) < budget * _DRIFT
        return None if expected or len(planned) >= _ROUNDS else Aim(last.drift)
    tried = sum(o.aim.between for o in outcomes)
    room = budget - (closest.peak or 0)
    if tried >= _BETWEEN or room <= budget * _ROOM or high - low <= budget * _DRIFT:
        return None
    return Aim((low + high) // 2, between=True)


def _fits(outcome: Outcome, budget: int) -> bool:
    return outcome.peak is not None and outcome.peak <= budget
