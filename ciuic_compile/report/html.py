"""A plan as one self-contained HTML file: it makes no request, and its figures are the plan file's."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from ciuic_compile.report._format import duration, factor, percent, price_sentence, short_file, size
from ciuic_compile.report.summary import KEPT, RECOMPUTED, action_label, reason_of, summarize
from ciuic_compile.types import Block, Line, Plan, Track

_TEMPLATES: Final = Path(__file__).parent / "templates"


def render_html(plan: Plan) -> str:
    """Return the plan as a complete HTML document; everything that came from the user is escaped."""
    assets = {"css": _read("plan.css"), "script": _read("plan.js"), "data": _embedded(page_data(plan))}
    return str(_template().render(p=plan, s=summarize(plan), **assets)) + "\n"


def page_data(plan: Plan) -> dict[str, Any]:
    """What the page's script reads: tables by column, with each text once; -1 stands for none."""
    texts: dict[str, int] = {}
    timeline = plan.timeline
    lines = {line: i for i, line in enumerate(timeline.lines)} if timeline else {}

    def text(value: str | None) -> int:
        return -1 if value is None else texts.setdefault(value, len(texts))

    def shape(sizes: Iterable[int]) -> int:
        return text(", ".join(map(str, sizes)))

    decisions = []
    for d in plan.decisions:
        s = d.storage
        place = Line(s.source.file, s.source.line, s.source.code)
        decisions.append({
            "id": text(s.id or s.name),
            "action": text(d.codec or action_label(d)),
            "kind": text(s.kind.value),
            "line": lines.setdefault(place, len(lines)) if place.file else -1,
            "dtype": text(s.dtype),
            "shape": shape(s.shape),
            "nbytes": s.nbytes,
            "baseline": d.baseline_bytes,
            "saved": d.saved_bytes,
            "reason": text(reason_of(d)),
        })  # fmt: skip

    def block(b: Block) -> dict[str, int]:
        return {
            "id": text(b.id),
            "role": text(b.role.value),
            "kind": text(b.kind and b.kind.value),
            "module": text(b.module),
            "line": -1 if b.line is None else b.line,
            "dtype": text(b.dtype or None),
            "shape": shape(b.shape),
            "codec": text(b.codec),
            "nbytes": b.nbytes,
            "first": b.first,
            "last": b.last,
        }

    def track(t: Track) -> dict[str, Any]:
        names = ("id", "role", "kind", "module", "line", "dtype", "shape", "codec", "nbytes", "first", "last")
        return {
            "steps": [text(step) for step in t.steps],
            "forward_steps": t.forward_steps,
            "blocks": _columns(names, [block(b) for b in t.blocks]),
        }

    tracks = {"baseline": track(timeline.baseline), "planned": track(timeline.planned)} if timeline else {}
    names = ("id", "action", "kind", "line", "dtype", "shape", "nbytes", "baseline", "saved", "reason")
    return {
        "budget": plan.budget_bytes,
        "tracks": tracks,
        "decisions": _columns(names, decisions),
        "lines": [[text(line.file), line.line, text(line.code)] for line in lines],
        "strings": list(texts),
    }


def _columns(names: Iterable[str], rows: list[dict[str, int]]) -> dict[str, list[int]]:
    return {name: [row[name] for row in rows] for name in names}


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text("utf-8")


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(size=size, percent=percent, duration=duration, factor=factor, share=_share)
    environment.globals.update(price_sentence=price_sentence, short_file=short_file, tone=_tone)
    return environment.from_string(_read("plan.html.j2"))


def _share(part: int, whole: int) -> str:
    """``part`` of ``whole`` in percent for a width, between 0 and 100."""
    return f"{min(max(part / whole, 0.0), 1.0) * 100 if whole > 0 else 0.0:.2f}"


def _tone(label: str) -> str:
    return {KEPT: "kept", RECOMPUTED: "recomputed"}.get(label, "codec")
