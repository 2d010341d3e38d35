"""docs/ci-gate.md is true: its files are written, its edit is made, its commands end as they are shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from ciuic_compile.cli import COMMANDS
from ciuic_compile.gate import settings
from tests.gate.conftest import Ran

DOCS = Path(__file__).resolve().parents[2] / "docs"
STEP = re.compile(r"<!-- (file|edit|run): (\S+) -->\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ciuic: Callable[..., Ran]) -> None:
    monkeypatch.chdir(tmp_path)
    steps = STEP.findall((DOCS / "ci-gate.md").read_text())
    assert [kind for kind, _, _ in steps] == ["file", "file", "run", "edit", "run", "run", "run"]
    for kind, what, text in steps:
        path = tmp_path / what
        if kind == "file":
            path.write_text(text)
        elif kind == "edit":
            old = path.read_text()
            start = text.partition("(")[0]
            path.write_text(re.sub(re.escape(start) + ".*\n", lambda _, new=text: new, old))
            assert path.read_text() != old
        else:
            run_and_compare(text, int(what), ciuic)


def run_and_compare(text: str, status: int, ciuic: Callable[..., Ran]) -> None:
    """Run the commands; each line shown is the beginning of a line printed."""
    printed: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ ciuic "):
            ran = ciuic(*shlex.split(line)[2:])
            assert ran.status == status, ran
            printed = ran.out.splitlines()
        else:
            assert any(found.startswith(line) for found in printed), (line, printed)


def test_every_key_of_the_settings_is_in_the_table() -> None:
    text = (DOCS / "ci-gate.md").read_text()
    table = {
        key
        for row in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
        for key in re.findall(r"`(\w+)`", row)
    }
    known = settings._ENTRY | settings._CIUIC
    assert table == known and {f.name for f in fields(settings.Limits)} <= table


def test_the_workflow_runs_commands_that_exist() -> None:
    text = (DOCS / "ci-gate-workflow.yml").read_text()
    commands = re.findall(r"run: ciuic (\w+)", text)
    assert len(commands) == 3 and set(commands) <= set(COMMANDS)
