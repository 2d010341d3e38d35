"""HiGHS without what it prints: scipy's build writes to the process's stdout when it repairs a solution."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog, milp
from scipy.sparse import vstack

from .relaxation import Rows

Floats = NDArray[np.float64]

_PREFIX = b"HighsMip"


def quiet_milp(*args: Any, **kwargs: Any) -> Any:
    """``scipy.optimize.milp``, with HiGHS's own lines taken out of stdout."""
    with _without_lines(_PREFIX):
        return milp(*args, **kwargs)


@dataclass(frozen=True)
class Relaxed:
    """What a linear program came to.

    Attributes:
        x: the columns; None if none were found.
        fun: the objective there.
        status: as scipy's: 0 is optimal, 1 a limit, 2 infeasible.
        falls: by how much the objective falls at most with a byte more of budget. The least objective is
            convex in the rows' ``high``, so it lies on or above this line at any other budget.
    """

    x: Floats | None
    fun: float
    status: int
    falls: float


def relaxed(objective: Floats, lower: Floats, upper: Floats, rows: Rows, seconds: float) -> Relaxed:
    """Minimise with columns anywhere between their bounds."""
    equal = rows.low == rows.high
    at_most, at_least = ~equal & np.isfinite(rows.high), ~equal & np.isfinite(rows.low)
    matrix = rows.matrix.tocsr()
    result = linprog(
        objective,
        A_ub=vstack([matrix[at_most], -matrix[at_least]]),
        b_ub=np.concatenate([rows.high[at_most], -rows.low[at_least]]),
        A_eq=matrix[equal],
        b_eq=rows.high[equal],
        bounds=np.stack([lower, upper], axis=1),
        method="highs-ds",
        # The steepest edges that HiGHS follows by default took up to three times as long.
        options={"time_limit": seconds, "simplex_dual_edge_weight_strategy": "devex"},
    )
    falls = 0.0
    if result.status == 0:
        marginals = result.ineqlin.marginals[: int(at_most.sum())]  # not positive
        falls = -float(marginals @ rows.a_byte[at_most])
    return Relaxed(result.x, float(result.fun or 0.0), int(result.status), max(0.0, falls))


@contextmanager
def _without_lines(prefix: bytes) -> Iterator[None]:
    """Hold back what is written to file descriptor 1; then write all but those lines (other threads')."""
    try:
        sys.stdout.flush()
        saved = os.dup(1)
    except (OSError, ValueError, AttributeError):  # stdout is closed, or never was
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)
            held.seek(0)
            rest = b"".join(line for line in held if not line.startswith(prefix))
            while rest:
                rest = rest[os.write(1, rest) :]
