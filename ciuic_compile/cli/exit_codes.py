"""What the exit status of ``ciuic`` means (docs/cli.md), and which error ends in which."""

from __future__ import annotations

from typing import Final

from ciuic_compile.errors import (
    BaselineError,
    CiuicError,
    InfeasibleBudgetError,
    PassError,
    VerificationError,
)

PASS: Final = 0
REGRESSION: Final = 1
USAGE: Final = 2
BASELINE: Final = 3  # missing, or of another model, version or environment
INFEASIBLE: Final = 4
MEASURED_DIFFERS: Final = 5
INTERNAL: Final = 70

# The first class that an error belongs to decides; any other error of this package is the user's to mend.
_OF_ERRORS: Final[tuple[tuple[type[CiuicError], int], ...]] = (
    (BaselineError, BASELINE),
    (InfeasibleBudgetError, INFEASIBLE),
    (PassError, INTERNAL),
    (VerificationError, INTERNAL),
)


def of(error: BaseException) -> int:
    """The exit status for an error that ended a command."""
    if not isinstance(error, CiuicError):
        return INTERNAL
    return next((code for kind, code in _OF_ERRORS if isinstance(error, kind)), USAGE)
