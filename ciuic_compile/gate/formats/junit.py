"""JUnit XML, as most CI systems read it: a test case an entry (schema: Jenkins' junit-4.xsd)."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from ciuic_compile.gate.compare import Check, Status
from ciuic_compile.gate.formats import Outcome
from ciuic_compile.gate.formats.text import culprit_line

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ERRORS = (Status.ERROR,)


def render(outcome: Outcome) -> str:
    """A regression is a ``failure``, a target that cannot be planned an ``error``."""
    errors = sum(check.status in _ERRORS for check in outcome.checks)
    failures = sum(check.failed for check in outcome.checks) - errors
    counts = {"tests": str(len(outcome.checks)), "failures": str(failures), "errors": str(errors)}
    root = ET.Element("testsuites", {"name": "ciuic", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": f"ciuic {outcome.command}", **counts})
    for check in outcome.checks:
        case = ET.SubElement(
            suite, "testcase", {"name": _clean(check.name), "classname": f"ciuic.{outcome.command}"}
        )
        text = _clean("\n".join(_lines(check)))
        if check.failed:
            kind = "error" if check.status in _ERRORS else "failure"
            found = ET.SubElement(case, kind, {"type": check.status.value, "message": _clean(check.title)})
            found.text = text
        elif text:
            ET.SubElement(case, "system-out").text = text
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join(
        ('<?xml version="1.0" encoding="UTF-8"?>\n', "\n")
    )


def _lines(check: Check) -> list[str]:
    lines = [f"{m.name}: {m.words}" for m in check.measures if m.before is not None]
    lines += check.details
    lines += [f"likely culprit: {culprit_line(c)}" for c in check.culprits]
    return [*lines, check.fix] if check.fix else lines


def _clean(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return _NO_XML.sub("?", text)
