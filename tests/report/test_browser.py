"""The page in a real browser: no request, the plan file's figures, a mouse, keys, and 10,000 tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciuic_compile.report import render_html
from ciuic_compile.report._format import size, step_name
from ciuic_compile.types import Block, Plan, Timeline
from tests.report.browser import Page, browser, find

pytestmark = pytest.mark.skipif(
    find() is None, reason="no Chromium here: apt-get install chromium, or name one in CIUIC_CHROMIUM"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, many: Plan) -> Path:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(render_html(many), "utf-8")
    return path


@pytest.fixture
def timeline(many: Plan) -> Timeline:
    assert many.timeline is not None
    return many.timeline


@pytest.fixture
def opened(page: Page, file: Path) -> Page:
    page.requests.clear()
    page.problems.clear()
    page.open(file)
    return page


def text(page: Page, name: str) -> str:
    return str(page.run(f"document.getElementById('{name}').textContent"))


def chosen(page: Page) -> str:
    """Id of the block that the details are of."""
    return str(page.run("document.querySelector('#block h3').textContent")).split(" (held")[0]


def chart(page: Page) -> list[float]:
    """Left, top, width and height of the planned chart in the window, after it was scrolled to."""
    page.run("document.getElementById('planned').scrollIntoView({block: 'center'})")
    box = "document.getElementById('planned').getBoundingClientRect()"
    return list(page.run(f"(b => [b.left, b.top, b.width, b.height])({box})"))


def test_no_request_and_no_error(opened: Page, file: Path) -> None:
    assert opened.requests == [file.as_uri()]
    assert opened.problems == []


def test_figures_are_the_plans(opened: Page, many: Plan, timeline: Timeline) -> None:
    for name, track, peak in (
        ("baseline", timeline.baseline, many.baseline_peak_bytes),
        ("planned", timeline.planned, many.simulated_peak_bytes),
    ):
        expected = f"peak {size(peak)} at {step_name(track, track.peak_step)}, {len(track.blocks)} storages"
        assert text(opened, f"{name}-caption") == expected
    track = timeline.planned
    there = track.alive(track.peak_step)
    expected = (
        f"{size(track.peak_bytes)} alive in {len(there)} storages at {step_name(track, track.peak_step)}"
    )
    assert text(opened, "alive-title") == expected  # opens at the planned peak
    shown = opened.run("[...document.querySelectorAll('#alive button')].map(b => b.children[1].textContent)")
    assert shown == [size(b.nbytes) for b in there[:9]]
    assert text(opened, "count") == "10000 of 10000 storages"


def test_pointing_at_a_block_names_it(opened: Page, timeline: Timeline) -> None:
    track = timeline.planned
    left, top, width, height = chart(opened)
    opened.mouse(left + width / 2, top + height * 0.8)
    step = int(opened.run("document.getElementById('step').value"))
    block = {b.id: b for b in track.alive(step)}[chosen(opened)]
    details = text(opened, "block")
    line = timeline.line(block)
    assert f"({block.nbytes:,} B)" in details
    assert f"{line.file}:{line.line}" in details
    assert line.code in details
    assert f"{step_name(track, block.first)} to {step_name(track, block.last)}" in details
    assert f"codec{block.codec or 'none'}" in details
    opened.mouse(left + width / 2, top + height * 0.8, click=True)  # held from now on
    opened.mouse(left + width / 3, top + height * 0.9)
    assert chosen(opened) == block.id


def test_the_keyboard_does_what_the_mouse_does(opened: Page, timeline: Timeline) -> None:
    track = timeline.planned
    opened.run("document.getElementById('planned').focus()")
    opened.key("Home")
    opened.key("ArrowRight")
    assert text(opened, "where") == f"Planned, {step_name(track, 1)}"
    opened.key("ArrowUp")
    first = chosen(opened)
    opened.key("ArrowUp")
    ids = {b.id for b in track.alive(1)}
    assert {first, chosen(opened)} <= ids
    assert (first == chosen(opened)) == (len(ids) == 1)
    opened.key("Escape")
    assert chosen(opened) == "No block chosen"
    opened.key("PageDown")
    assert int(opened.run("document.getElementById('step').value")) > 1
    opened.run("document.querySelector('#peaks button').focus()")
    opened.key("Enter")
    assert text(opened, "where") == f"Inductor, {step_name(timeline.baseline, timeline.baseline.peak_step)}"


def test_the_table_is_searched_sorted_and_leads_to_the_chart(opened: Page, timeline: Timeline) -> None:
    def matching(block: Block) -> bool:
        return "layers.42.mlp" in block.id

    opened.run("document.getElementById('search').focus()")
    opened.run("document.execCommand('insertText', false, 'LAYERS.42.mlp')")
    every = {b.id: b for track in (timeline.baseline, timeline.planned) for b in track.blocks if matching(b)}
    assert text(opened, "count").startswith(f"{len(every)} of ")
    opened.run(
        "[...document.querySelectorAll('#storages th button')].find(b => b.textContent == 'storage').click()"
    )
    ids = opened.run("[...document.querySelectorAll('#storages tbody tr')].map(r => r.dataset.id)")
    assert ids == sorted(every)[: len(ids)]
    opened.run("document.querySelector('#storages tbody button').click()")
    assert chosen(opened) == ids[0]
    assert opened.run("document.querySelector('#storages tr[aria-selected=true]').dataset.id") == ids[0]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False)])
def test_nothing_sticks_out_and_text_has_contrast(page: Page, file: Path, width: int, dark: bool) -> None:
    page.open(file, width=width, dark=dark)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    luminance = """(name => {
      const [r, g, b] = getComputedStyle(document.body)[name].match(/\\d+/g)
        .map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b;
    })"""
    ink, paper = (page.run(f"{luminance}('{name}')") for name in ("color", "backgroundColor"))
    assert (ink > paper) is dark
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7


def test_ten_thousand_tensors_stay_quick(opened: Page) -> None:
    """Each figure is generous: these machines draw without a GPU and share their cores."""
    start = time.perf_counter()
    for name in ("module", "kind", "role"):
        opened.run(f"document.getElementById('by').value = '{name}'")
        opened.run("document.getElementById('by').dispatchEvent(new Event('change'))")
    assert time.perf_counter() - start < 10
    left, top, width, height = chart(opened)
    start = time.perf_counter()
    for i in range(10):
        opened.mouse(left + width * (0.3 + 0.03 * i), top + height * 0.8)
    opened.drawn()
    assert time.perf_counter() - start < 5
    assert opened.problems == []
