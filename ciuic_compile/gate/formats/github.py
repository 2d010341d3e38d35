"""Workflow commands of GitHub Actions: annotations on the lines of a pull request."""

from __future__ import annotations

from ciuic_compile.gate.compare import Check, Status
from ciuic_compile.gate.formats import Outcome
from ciuic_compile.gate.formats.text import culprit_line
from ciuic_compile.gate.formats.text import render as render_text


def render(outcome: Outcome) -> str:
    """The text for the log, and a command for each entry that failed, improved, or has a warning."""
    return render_text(outcome) + "".join(f"{_command(c)}\n" for c in outcome.checks if _is_told(c))


def _is_told(check: Check) -> bool:
    return check.failed or check.status is Status.IMPROVED or bool(check.culprits)


def _command(check: Check) -> str:
    level = "error" if check.failed else "notice" if check.status is Status.IMPROVED else "warning"
    named = [c for c in check.culprits if c.file]
    file, line = (named[0].file, named[0].line) if named else (check.settings_file, max(check.line, 1))
    told = [
        f"{check.name}: {check.title}",
        *check.details,
        *map(culprit_line, named),
        *filter(None, [check.fix]),
    ]
    title = f"ciuic: {check.name}"
    return (
        f"::{level} file={_property(file)},line={line},title={_property(title)}::{_data(chr(10).join(told))}"
    )


def _data(text: str) -> str:
    """Escaped as actions/toolkit does in ``core.issueCommand``."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
