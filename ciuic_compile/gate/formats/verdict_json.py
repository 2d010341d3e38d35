"""JSON, schema ``ciuic.check/1`` (``check.schema.json``)."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any, Final

from ciuic_compile.gate.compare import Check, Measure
from ciuic_compile.gate.culprits import Culprit
from ciuic_compile.gate.formats import Outcome

SCHEMA: Final = "ciuic.check/1"


def schema() -> dict[str, Any]:
    """The published JSON schema (draft 2020-12)."""
    text = resources.files("ciuic_compile.gate").joinpath("check.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def render(outcome: Outcome) -> str:
    """Everything that is known, as ASCII JSON; bytes are whole numbers."""
    document = {
        "schema": SCHEMA,
        "command": outcome.command,
        "exit_code": outcome.exit_code,
        "entries": [_check(check) for check in outcome.checks],
        "notes": list(outcome.notes),
    }
    return json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _check(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "status": check.status.value,
        "exit_code": check.exit_code,
        "title": check.title,
        "measures": [_measure(m) for m in check.measures],
        "details": list(check.details),
        "culprits": [_culprit(c) for c in check.culprits],
        "fix": check.fix,
        "settings": {"file": check.settings_file, "line": check.line},
    }


def _measure(m: Measure) -> dict[str, Any]:
    return {
        "name": m.name, "unit": m.unit, "before": _number(m.before, m.unit), "now": _number(m.now, m.unit),
        "limit": _number(m.limit, m.unit), "exceeded": m.exceeded,
    }  # fmt: skip


def _number(value: float | None, unit: str) -> float | int | None:
    if value is None or not math.isfinite(value):
        return None
    return int(value) if unit == "bytes" else float(value)


def _culprit(c: Culprit) -> dict[str, Any]:
    return {
        "file": c.file,
        "line": c.line,
        "code": c.code,
        "module": c.module,
        "bytes": c.nbytes,
        "tensors": c.count,
        "changed": c.changed,
        "why": list(c.why),
    }
