"""Markdown, for a comment on a pull request or a job's summary."""

from __future__ import annotations

from ciuic_compile.gate.compare import Check
from ciuic_compile.gate.culprits import Culprit
from ciuic_compile.gate.formats import Outcome, label
from ciuic_compile.report._format import size


def render(outcome: Outcome) -> str:
    """A table of all entries, and a section for each that failed or has something to say."""
    lines = [
        f"### ciuic {outcome.command}: {outcome.verdict}",
        "",
        "| entry | | before | now |",
        "|---|---|---|---|",
    ]
    for check in outcome.checks:
        peak = check.measures[0] if check.measures else None
        before = peak.figure(peak.before) if peak and peak.before is not None else ""
        now = peak.figure(peak.now) if peak else ""
        lines.append(f"| {_cell(check.name)} | {label(check)} | {before} | {now} |")
    for check in outcome.checks:
        if check.failed or check.culprits or check.details or outcome.command == "diff":
            lines += ["", *_section(check)]
    lines += [f"\n> {_cell(note)}" for note in outcome.notes]
    return "\n".join(lines) + "\n"


def _section(check: Check) -> list[str]:
    lines = [f"**{_cell(check.name)}**: {_cell(check.title)}", ""]
    changed = [m for m in check.measures if m.before is not None and m.before != m.now]
    lines += [f"- {m.name}: {m.words}" for m in changed]
    lines += [f"- {_cell(detail)}" for detail in check.details]
    if check.culprits:
        lines += ["", "| likely culprit | grew | why |", "|---|---|---|", *map(_row, check.culprits)]
    if check.fix:
        lines += ["", f"{_cell(check.fix)}"]
    return lines


def _row(c: Culprit) -> str:
    code = f" {_code(c.code)}" if c.code else ""
    return f"| {_cell(c.where)}{code} | {size(c.nbytes) if c.nbytes else ''} | {_cell('; '.join(c.why))} |"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, on one line and within a table's cell."""
    for sign in "\\|`*_<>[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _code(text: str) -> str:
    """A code span in a cell; text that has back quotes itself is escaped instead."""
    line = " ".join(text.split())
    return _cell(line) if "`" in line else "`" + line.replace("|", "\\|") + "`"
