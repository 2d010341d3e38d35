"""Where plans go: to logging, to files, nowhere; and that it can be silenced."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ciuic_compile.config import CompileConfig, parse_options
from ciuic_compile.report import emit, emit_note, from_json, render_html, render_text
from ciuic_compile.report import emit as emit_function
from ciuic_compile.types import Plan

emit_module = sys.modules["ciuic_compile.report.emit"]
LOGGER = logging.getLogger("ciuic_compile")


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A process that has logged and written nothing; call it to remove pytest's handlers."""

    def remove_handlers() -> None:
        monkeypatch.setattr(LOGGER, "handlers", [])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])

    monkeypatch.setattr(emit_module, "_written", {})
    monkeypatch.setenv("COLUMNS", "120")
    level = LOGGER.level
    LOGGER.setLevel(logging.NOTSET)
    yield remove_handlers
    LOGGER.setLevel(level)


def test_plain_process_prints_to_stderr_once(
    bare: Callable[[], None], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    bare()
    assert emit(plan, CompileConfig()) is None
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", render_text(plan))
    emit(plan, CompileConfig(report="full"))
    assert capsys.readouterr().err == render_text(plan, "full")
    emit_note("inference graph", CompileConfig())
    assert capsys.readouterr().err == "ciuic: inference graph\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_unless_it_wants_none(
    bare: Callable[[], None], plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    emit(plan, CompileConfig())
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in written
    assert re.sub(r"\x1b\[[\d;]*m", "", written) == render_text(plan)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    emit(plan, CompileConfig())
    plain = re.sub(r"\x1b\[(?:0|1)?m", "", sys.stderr.getvalue())  # type: ignore[attr-defined]
    assert plain == render_text(plan)  # bold is no colour


def test_off_prints_nothing(bare: Callable[[], None], plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    bare()
    emit(plan, CompileConfig(report="off"))
    emit_note("x", CompileConfig(report="off"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["level", "null handler", "logging.disable"])
def test_logging_silences(
    how: str, bare: Callable[[], None], plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    bare()
    try:
        if how == "level":
            LOGGER.setLevel(logging.WARNING)
        elif how == "null handler":
            LOGGER.addHandler(logging.NullHandler())
        else:
            logging.disable(logging.INFO)
        emit(plan, CompileConfig())
        assert capsys.readouterr() == ("", "")
    finally:
        logging.disable(logging.NOTSET)


def test_users_handler_gets_it_instead(
    bare: Callable[[], None], plan: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare()
    emit(plan, CompileConfig())  # ours is attached first, and must go
    capsys.readouterr()
    stream = io.StringIO()
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(stream)])
    emit(plan, CompileConfig())
    assert stream.getvalue() == render_text(plan)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("suffix", ["json", "html", "txt"])
def test_files(
    suffix: str, bare: Callable[[], None], plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare()
    config = parse_options({"report": tmp_path / f"plan.{suffix}"})
    second = replace(plan, name="graph 1")
    assert emit(plan, config) == str(tmp_path / f"plan.{suffix}")
    assert emit(second, config) == str(tmp_path / f"plan-2.{suffix}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"plan-2.{suffix}", f"plan.{suffix}"]
    texts = [(tmp_path / name).read_text("utf-8") for name in (f"plan.{suffix}", f"plan-2.{suffix}")]
    if suffix == "json":
        assert [from_json(t) for t in texts] == [plan, second]
    else:
        render = render_html if suffix == "html" else lambda p: render_text(p, "full")
        assert texts == [render(plan), render(second)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(f"plan.{suffix}")
    assert "planned peak 640 MiB" in lines[0]


def test_a_new_process_replaces_the_old_file(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    emit(plan, parse_options({"report": path}))
    assert from_json(path.read_text()) == plan


def test_unwritable_path_warns_and_prints(
    bare: Callable[[], None], plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare()
    folder = tmp_path / "gone"
    folder.mkdir()
    config = parse_options({"report": folder / "plan.json"})
    folder.rmdir()
    assert emit_function(plan, config) is None
    err = capsys.readouterr().err
    assert "cannot write the plan" in err
    assert err.endswith(render_text(plan))


def test_failed_write_leaves_the_old_file_and_no_litter(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    assert emit(plan, parse_options({"report": path})) is None
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_names_that_utf8_cannot_hold(plan: Plan, tmp_path: Path) -> None:
    bad = replace(plan, name="\ud800")
    for suffix in ("json", "html", "txt"):
        assert emit(bad, parse_options({"report": tmp_path / f"p.{suffix}"}))
