"""Verdicts for people and for CI systems: one module a format, each with ``render(outcome) -> str``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Final

from ciuic_compile.gate.compare import Check, Status

#: Modules of this package, by what ``--format`` calls them.
FORMATS: Final = {
    "text": "text",
    "json": "verdict_json",
    "md": "markdown",
    "junit": "junit",
    "sarif": "sarif",
    "github": "github",
}


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        command: ``"check"`` or ``"diff"``.
        checks: one an entry.
        exit_code: of the command.
        notes: sentences on the run as a whole.
    """

    command: str
    checks: tuple[Check, ...]
    exit_code: int = 0
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """``2 of 3 entries passed``, or of a diff which grew."""
        if self.command == "diff":
            return f"{len(self.checks)} compared"
        passed = sum(not check.failed for check in self.checks)
        return f"{passed} of {len(self.checks)} {'entry' if len(self.checks) == 1 else 'entries'} passed"


def render(outcome: Outcome, kind: str) -> str:
    """The outcome in a format of ``FORMATS``, ended by a newline."""
    text: str = importlib.import_module(f"{__name__}.{FORMATS[kind]}").render(outcome)
    return text


def label(check: Check) -> str:
    """The status in one word, as people read it."""
    return {Status.IMPROVED: "pass", Status.ENVIRONMENT: "new versions"}.get(check.status, check.status.value)
