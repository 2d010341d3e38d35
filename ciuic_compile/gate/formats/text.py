"""Plain text for a terminal or a log."""

from __future__ import annotations

from ciuic_compile.gate.compare import Check
from ciuic_compile.gate.culprits import Culprit
from ciuic_compile.gate.formats import Outcome, label
from ciuic_compile.report._format import ascii_line, crop, size


def render(outcome: Outcome) -> str:
    """One paragraph an entry."""
    lines = [line for check in outcome.checks for line in (*_check(check, outcome.command), "")]
    lines += [f"note: {note}" for note in outcome.notes]
    lines.append(f"ciuic {outcome.command}: {outcome.verdict}")
    return "\n".join(lines) + "\n"


def culprit_line(culprit: Culprit) -> str:
    """``model.py:42  `x = x.float()`  +24.0 MiB in 12 tensors; dtype bfloat16 -> float32``."""
    parts = [f"{culprit.where}"]
    if culprit.code:
        parts.append(f"`{crop(ascii_line(culprit.code), 80)}`")
    if culprit.nbytes:
        tensors = f" in {culprit.count} tensors" if culprit.count > 1 else ""
        parts.append(f"+{size(culprit.nbytes)}{tensors}")
    said = "; ".join(culprit.why)
    return "  ".join(parts) + (f" ({said})" if said else "")


def _check(check: Check, command: str) -> list[str]:
    head = f"{ascii_line(check.name)}: {ascii_line(check.title)}"
    lines = [head if command == "diff" else f"{label(check).upper():<13} {head}"]
    if check.failed or command == "diff":
        lines += [
            f"    {m.name}: {m.words}" for m in check.measures if m.before is not None and m.before != m.now
        ]
    lines += [f"  {ascii_line(detail)}" for detail in check.details]
    if check.culprits:
        lines.append("  likely culprit:")
        lines += [f"    {culprit_line(c)}" for c in check.culprits[:1]]
        if check.culprits[1:]:
            lines.append("  also:")
            lines += [f"    {culprit_line(c)}" for c in check.culprits[1:]]
    if check.fix:
        lines.append(f"  {ascii_line(check.fix)}")
    return lines
