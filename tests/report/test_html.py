"""The HTML page: complete, self-contained, and with everything from the user escaped."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_compile.report import render_html
from ciuic_compile.types import Plan

_VOID = {"meta", "br"}


class Balanced(HTMLParser):
    """Collects tags and attributes, and fails on one closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
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
    assert "http" not in page
    assert "<script" not in page
    assert "@import" not in page
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
    page = render_html(replace(plan, name=evil, mode=evil, device=evil, notes=(evil,), decisions=decisions))
    parser = parse(page)
    assert "script" not in parser.tags
    assert "<script" not in page
    assert "{{ 7*7 }}" in page


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_plan_gives_a_page(plans: st.SearchStrategy[Plan], data: st.DataObject) -> None:
    plan = data.draw(plans)
    parser = parse(render_html(plan))
    assert parser.tags <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td"),
        *("div", "i", "br", "code"),
    }
    assert parser.attributes <= {"lang", "charset", "name", "content", "class", "scope", "style", "title"}
