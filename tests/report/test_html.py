"""The HTML page: complete, self-contained, and with everything from the user escaped."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_compile.report import render_html, to_json
from ciuic_compile.report.html import page_data
from ciuic_compile.types import Plan

_VOID = {"meta", "br", "input"}


class Balanced(HTMLParser):
    """Collects tags and attributes, and fails on one closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.scripts += tag == "script"
        self.attributes |= {name for name, _ in attrs}
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(page: str) -> Balanced:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_page(plan: Plan) -> None:
    page = render_html(plan)
    parse(page)
    assert page.startswith("<!DOCTYPE html>")
    assert "prefers-color-scheme: dark" in page
    assert "://" not in page
    assert "default-src 'none'" in page  # a browser refuses every request that a later change might add
    assert "@import" not in page
    assert "url(" not in page
    for words in (
        "graph 0 (Model.forward)",
        "INT4",
        "blocks.*.mlp",
        "only the loss is computed from it",
        "budget",
    ):
        assert words in page


def test_empty() -> None:
    parse(render_html(Plan("", "off", (), 0, 0, 0, 0, 0.0, 0.0, 0.0)))


def test_hostile_names_are_text(plan: Plan) -> None:
    evil = "\"><script>alert('x')</script>{{ 7*7 }}"
    decisions = tuple(
        replace(d, reason=evil, codec=evil, storage=replace(d.storage, name=evil, op=evil, dtype=evil,
                source=replace(d.storage.source, file=evil, code=evil, module=evil)))
        for d in plan.decisions
    )  # fmt: skip
    bad = replace(plan, name=evil, mode=evil, device=evil, notes=(evil,), decisions=decisions)
    page = render_html(bad)
    parser = parse(page)
    assert parser.scripts == 2
    assert "alert('x')" not in page.split('id="data"')[0]
    assert embedded(page) == page_data(bad)
    assert evil in embedded(page)["strings"]
    assert "{{ 7*7 }}" in page


def embedded(page: str) -> Any:
    """The data in a page, as its script reads it: up to the first end tag."""
    start = page.index('<script type="application/json" id="data">') + len(
        '<script type="application/json" id="data">'
    )
    return json.loads(page[start : page.index("</script>", start)])


def test_figures_are_those_of_the_plan_file(many: Plan) -> None:
    data = embedded(render_html(many))
    document = json.loads(to_json(many))["plan"]
    texts = data["strings"]
    for name in ("baseline", "planned"):
        ours, theirs = data["tracks"][name], document["timeline"][name]
        columns = ours["blocks"]
        for field in ("nbytes", "first", "last"):
            assert columns[field] == [b[field] for b in theirs["blocks"]]
        for field in ("id", "role", "module"):
            assert [texts[i] for i in columns[field]] == [b[field] for b in theirs["blocks"]]
        assert ours["forward_steps"] == theirs["forward_steps"]
        assert [texts[i] for i in ours["steps"]] == theirs["steps"]
    for ours, theirs in (("nbytes", "nbytes"), ("saved", "saved_bytes"), ("baseline", "baseline_bytes")):
        expected = [d["storage"][theirs] if theirs == "nbytes" else d[theirs] for d in document["decisions"]]
        assert data["decisions"][ours] == expected


def test_ten_thousand_tensors_take_less_than_5_mb(many: Plan) -> None:
    assert len(render_html(many).encode()) < 5e6


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_plan_gives_a_page(plans: st.SearchStrategy[Plan], data: st.DataObject) -> None:
    plan = data.draw(plans)
    page = render_html(plan)
    parser = parse(page)
    assert parser.scripts == 2
    assert not [a for a in parser.attributes if a.startswith("on") or a in ("src", "href", "srcset")]
    assert embedded(page) == json.loads(json.dumps(page_data(plan)))
