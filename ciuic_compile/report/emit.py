"""Printing and writing plans: the only part of the report that touches the outside."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from collections.abc import Callable
from typing import Final, Literal, TextIO, cast

from ciuic_compile.config import CompileConfig
from ciuic_compile.report import exports
from ciuic_compile.report._format import ascii_line, crop, size
from ciuic_compile.report.html import render_html
from ciuic_compile.report.plan_json import to_json
from ciuic_compile.report.text import MAX_WIDTH, render_note, render_text, styled
from ciuic_compile.types import Plan
from ciuic_compile.writing import write_file

LOGGER: Final = logging.getLogger("ciuic_compile")
_lock = threading.Lock()
_written: dict[str, int] = {}  # path asked for -> plans written for it by this process


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes bare messages to whatever ``sys.stderr`` is at that moment; a terminal gets colours."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # StreamHandler stores it; we look it up
        return sys.stderr

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if not self.stream.isatty():
                super().emit(record)
                return
            from rich.console import Console

            console = Console(file=self.stream, highlight=False, soft_wrap=True)
            console.print(styled(self.format(record)))
        except Exception:
            self.handleError(record)


_handler = _StderrHandler()


def emit(plan: Plan, config: CompileConfig) -> str | None:
    """Print or write one graph's plan as ``config.report`` says; call it once a graph, before it runs.

    ``"short"`` and ``"full"`` log the text at INFO to the logger ``ciuic_compile``; ``"off"`` does nothing.
    A path gets the plan, written to a temporary file and moved into place, and one line is logged. The first
    plan that this process writes to ``plan.json`` goes there, the next to ``plan-2.json``, ``plan-3.json``...

    Returns:
        The path written, or None. A path that cannot be written is a warning, not an error: the short
        text is logged in its place, and training goes on.
    """
    if config.report == "off":
        return None
    if config.report in ("short", "full"):
        detail = cast(Literal["short", "full"], config.report)
        _log(lambda: render_text(plan, detail, _columns()))
        return None
    suffix = _suffix(config.report)
    with _lock:
        number = _written[config.report] = _written.get(config.report, 0) + 1
    path = numbered(config.report, number)
    try:
        write_file(path, _WRITERS[suffix](plan))
    except OSError as error:
        _attach()
        LOGGER.warning("ciuic: cannot write the plan to %s: %s", path, error)
        _log(lambda: render_text(plan, "short", _columns()))
        return None
    peaks = f"planned peak {size(plan.planned_peak_bytes)} (Inductor {size(plan.baseline_peak_bytes)})"
    name = crop(ascii_line(plan.name), 40)
    _log(lambda: f"ciuic: {name}: {peaks}; the plan is in {ascii_line(path)}\n")
    return path


def emit_note(text: str, config: CompileConfig) -> None:
    """Log a one-line note at INFO, unless ``config.report`` is ``"off"``."""
    if config.report != "off":
        _log(lambda: render_note(text))


def numbered(path: str, number: int) -> str:
    """``plan.json``, then ``plan-2.json``, ``plan-3.json``, ..."""
    suffix = _suffix(path)
    stem = path.removesuffix(suffix)
    return path if number == 1 else f"{stem}-{number}{suffix}"


def _suffix(path: str) -> str:
    """The suffix that says what to write there: of two that fit (``.json``, ``.trace.json``) the longer."""
    return max((suffix for suffix in _WRITERS if path.endswith(suffix)), key=len, default="")


def _full(plan: Plan) -> str:
    return render_text(plan, "full")


_WRITERS: Final[dict[str, Callable[[Plan], str | bytes]]] = {
    ".json": to_json,
    ".html": render_html,
    ".txt": _full,
    **exports.WRITERS,
}


def _columns() -> int:
    return min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)


def _log(render: Callable[[], str]) -> None:
    """Log what ``render`` returns; it is not called when nobody would see it."""
    _attach()
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("%s", render().rstrip("\n"))


def _attach() -> None:
    """Let INFO reach stderr through a handler of ours, or through the user's where there are any."""
    with _lock:
        own = [h for h in LOGGER.handlers if h is not _handler]
        if own or (LOGGER.propagate and logging.getLogger().handlers):
            LOGGER.removeHandler(_handler)
        elif _handler not in LOGGER.handlers:
            LOGGER.addHandler(_handler)
        if LOGGER.level == logging.NOTSET:
            LOGGER.setLevel(logging.INFO)
