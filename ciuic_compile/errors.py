"""Every error this package raises on purpose.

All derive from :class:`CiuicError`, so ``except CiuicError`` catches them and nothing else.
Each message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CiuicError(Exception):
    """Base class of every error raised on purpose by ciuic-compile."""


class OptionError(CiuicError, ValueError):
    """A wrong option name or value; raised before any tracing."""


class InfeasibleBudgetError(CiuicError):
    """No plan fits the budget.

    Attributes:
        budget_bytes: what was asked for, in bytes.
        smallest_bytes: the smallest planned peak this planner found, in bytes.
    """

    def __init__(self, message: str, *, budget_bytes: int, smallest_bytes: int) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes


class PassError(CiuicError):
    """A graph pass failed; names the pass, the passes before it and the user's source line."""


class VerificationError(CiuicError):
    """A rewritten graph is not what the plan says; compiling stops rather than run it."""


class PeakDisagreementError(VerificationError):
    """An independent account of the rewritten graphs has a higher peak than the plan; the plan says so."""


class CalibrationError(CiuicError):
    """Nothing could be measured: no gradients, no batch, or no loss."""


class SizeError(CiuicError, ValueError):
    """Sizes that a plan with dynamic shapes was not made for: unknown, missing or out of range."""


class PlanFileError(CiuicError):
    """A plan file that cannot be read: not JSON, truncated, or of another schema version."""


class TargetError(CiuicError):
    """What was to be planned is not there, cannot be imported, or is no model with its inputs."""


class OutputError(CiuicError):
    """A file that was asked for cannot be written; nothing was."""


class SettingsError(CiuicError):
    """``ciuic.toml`` cannot be used: not TOML, an unknown key, a wrong value; names the file and the line."""


class BaselineError(CiuicError):
    """No baseline to compare with: missing, not readable, of another schema version, or of another model."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest valid word, or an empty string."""
    match = difflib.get_close_matches(word, sorted(valid), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
