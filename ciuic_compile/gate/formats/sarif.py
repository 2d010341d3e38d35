"""SARIF 2.1.0, for code scanning: a result for each entry that failed, at its likeliest culprit."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final
from urllib.parse import quote

from ciuic_compile.gate.compare import Check, Status
from ciuic_compile.gate.culprits import Culprit
from ciuic_compile.gate.formats import Outcome
from ciuic_compile.versions import version

_SCHEMA: Final = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_RULES: Final = {
    Status.REGRESSION: (
        "peak-vram-regression",
        "The planned memory of a training step grew beyond its limit.",
    ),
    Status.ENVIRONMENT: ("environment-changed", "Another version of a package changed the planned memory."),
    Status.MISSING: ("baseline-missing", "A training step has no accepted baseline."),
    Status.INCOMPATIBLE: ("baseline-incompatible", "The baseline is of another model or device."),
    Status.INFEASIBLE: ("budget-infeasible", "No plan fits the budget."),
    Status.ERROR: ("target-broken", "A target cannot be planned."),
}


def render(outcome: Outcome) -> str:
    """One run with its rules and results."""
    failed = [check for check in outcome.checks if check.failed]
    rules = [
        {"id": name, "shortDescription": {"text": text}, "defaultConfiguration": {"level": "error"}}
        for name, text in _RULES.values()
    ]
    document = {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "ciuic", "version": version("ciuic-compile"), "rules": rules}},
                "invocations": [{"executionSuccessful": True, "exitCode": outcome.exit_code}],
                "results": [_result(check) for check in failed],
            }
        ],
    }
    return json.dumps(document, indent=1, ensure_ascii=True) + "\n"


def _result(check: Check) -> dict[str, Any]:
    rule = _RULES[check.status][0]
    text = "\n".join([f"{check.name}: {check.title}", *check.details, *filter(None, [check.fix])])
    named = [c for c in check.culprits if c.file]
    first = named[0] if named else Culprit(check.settings_file, max(check.line, 1), "", 0)
    result: dict[str, Any] = {
        "ruleId": rule,
        "ruleIndex": [name for name, _ in _RULES.values()].index(rule),
        "level": "error",
        "message": {"text": text},
        "locations": [_location(first)],
        # the same finding in the next run, though lines have moved
        "partialFingerprints": {"entry/v1": hashlib.sha256(f"{rule} {check.name}".encode()).hexdigest()[:16]},
    }
    if named[1:]:
        result["relatedLocations"] = [{"id": i, **_location(c)} for i, c in enumerate(named[1:], 1)]
    return result


def _location(c: Culprit) -> dict[str, Any]:
    region: dict[str, Any] = {"startLine": max(c.line, 1)}
    if c.code:
        region["snippet"] = {"text": c.code}
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": quote(c.file)}, "region": region}
    }
    if c.why:
        location["message"] = {"text": "; ".join(c.why)}
    return location
