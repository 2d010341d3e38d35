"""The console examples of docs/cli.md run as they are written."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()


def test_console_examples(ciuic: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = r"<!-- file: (\S+) -->\n```python\n(.*?)^```$"
    for name, text in re.findall(files, PAGE, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(text)
    commands = re.findall(r"^\$ ciuic (.+)$", PAGE, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        ran = ciuic(*shlex.split(command))
        assert ran.status == 0, (command, ran.err)
        assert "train.py:12" in ran.out
    assert (tmp_path / "plan.json").exists() and (tmp_path / "plan.md").exists()
