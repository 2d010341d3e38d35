"""The examples in README.md and docs/ run as they are written, and their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from bench import budgets_table, results_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# what a page under docs/ may take as given: torch, logging, a model, and a plan.json from an earlier run
PREAMBLE = """
import logging, pathlib, torch
from ciuic_compile import Plan
from ciuic_compile.report import to_json
plan = Plan("graph 0", "4:1", (), 8, 2, 8, 4, 0.01, 0.04, 1.0)
pathlib.Path("plan.json").write_text(to_json(plan))
names = {"torch": torch, "logging": logging, "model": torch.nn.Linear(4, 4)}
"""


def examples(page: Path) -> str:
    """All ```python blocks of a page as one program; each block keeps its line numbers for tracebacks."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for match in FENCE.finditer(text):
        start = text[: match.start(1)].count("\n")
        block = match[1].splitlines()
        lines[start : start + len(block)] = block
    return "\n".join(lines)


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p).strip()], ids=lambda p: str(p.name))
def test_examples_run(page: Path, tmp_path: Path) -> None:
    program = tmp_path / f"{page.stem}.py"
    program.write_text(examples(page))
    start = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r})\n"
    if not metadata.entry_points(group="torch_dynamo_backends", name="ciuic"):
        start += "import ciuic_compile\n"  # stands in for the installed entry point
    if page.name == "README.md":  # stands alone: what a reader pastes first
        start += f"runpy.run_path({str(program)!r}, run_name='__main__')"
    else:
        start += f"{PREAMBLE}runpy.run_path({str(program)!r}, names, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_readme_has_examples() -> None:
    program = examples(ROOT / "README.md")
    assert 'backend="ciuic"' in program
    assert "enable_compression" in program


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.name))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_of_the_docs_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    missing = [
        p.name for p in PAGES if p.parent.name == "docs" and p.name != "index.md" and p.name not in index
    ]
    assert not missing


def test_results_are_those_of_the_files() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == results_page.page()


def test_the_table_of_budgets_is_of_the_files() -> None:
    assert (ROOT / "docs" / "budgets.md").read_text() == budgets_table.page()


def test_the_readme_counts_the_fractions_where_ours_is_faster() -> None:
    found = budgets_table.stated()["all"]
    readme = (ROOT / "README.md").read_text()
    (said,) = re.findall(r"faster at no higher peak at\s+(\d+) of (\d+) of torch's", readme)
    assert said == (str(found.faster), str(found.reached))


def test_the_readme_claims_no_figure_that_was_not_measured() -> None:
    text = (ROOT / "README.md").read_text()
    block = text[text.index("<!-- results") : text.index("<!-- /results -->")]
    figures = re.findall(r"[-+]?\d[\d,]*\.\d+", block)
    assert len(figures) >= 6
    page = results_page.page()
    assert [f for f in figures if f not in page] == []
