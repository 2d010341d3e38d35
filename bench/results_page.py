"""Write docs/results.md from the files in bench/results/: no figure in it is typed by hand.

python -m bench.results_page            # writes it
python -m bench.results_page --check    # exit code 1 where it differs
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import jinja2

from bench import common

RESULTS = common.ROOT / "bench" / "results"
PAGE = common.ROOT / "docs" / "results.md"
SOURCES: dict[str, str | list[str]] = {
    "saved_gpu": "saved-h200",
    "saved_cpu": "saved-cpu",
    "step": "step_time-h100",
    "shapes": ["llama_shapes-16x16384-h100", "llama_shapes-4x65536-h100"],
    "convergence": "convergence-h200",
}


def data() -> dict[str, Any]:
    """The result files by the names that the page uses."""

    def read(file: str) -> Any:
        return json.loads((RESULTS / f"{file}.json").read_text())

    return {n: read(f) if isinstance(f, str) else [read(each) for each in f] for n, f in SOURCES.items()}


def page() -> str:
    """The page as it should be."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(common.ROOT / "bench"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown
    )
    environment.filters |= {"mib": common.mib, "share": common.share}
    return environment.get_template("results_page.md.j2").render(**data())


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(page())
    elif not PAGE.is_file() or PAGE.read_text() != page():
        sys.exit("docs/results.md is out of date: python -m bench.results_page")


if __name__ == "__main__":
    main()
