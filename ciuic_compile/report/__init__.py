"""Plans for people and for programs, all written before anything runs."""

from ciuic_compile.report.emit import emit, emit_note
from ciuic_compile.report.exports import to_markdown, to_memory_viz, to_perfetto
from ciuic_compile.report.html import render_html
from ciuic_compile.report.plan_json import SCHEMA, from_json, to_json
from ciuic_compile.report.text import render_note, render_text

__all__ = [
    "SCHEMA",
    "emit",
    "emit_note",
    "from_json",
    "render_html",
    "render_note",
    "render_text",
    "to_json",
    "to_markdown",
    "to_memory_viz",
    "to_perfetto",
]
