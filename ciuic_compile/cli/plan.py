"""``ciuic plan``: plan a training step and print the plan."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ciuic_compile.cli import exit_codes, files, new_parser, steps

if TYPE_CHECKING:
    from ciuic_compile.types import Plan

EXAMPLES = """
ciuic plan train.py:make_model --device h200
ciuic plan train.py:make_model --mode 6:1 --report full
ciuic plan train.py:make_model --budget 12GiB --json plan.json --html plan.html
ciuic plan my_package.models:small --autocast bfloat16 --option deny='["head"]'
ciuic plan path/to/llama --device h200 --batch 4 --seq 4096 --dtype bfloat16
ciuic plan transformers.GPT2Config --md plan.md
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic plan``."""
    parser = new_parser(
        subparsers,
        "plan",
        "plan a training step and print the plan",
        EXAMPLES,
        "Nothing is run and no weights are allocated. Where the step compiles to several graphs, each has a "
        "plan; files are then called plan.json, plan-2.json, ...",
    )
    steps.add_target(parser)
    steps.add_plan_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--report", choices=("short", "full"), default="short", help="how much is printed")
    for name, what in (("json", "for programs"), ("html", "one page"), ("md", "Markdown")):
        group.add_argument(f"--{name}", metavar="FILE", help=f"write the plan there: {what}")


def run(args: argparse.Namespace) -> int:
    """Plan, print, write."""
    from ciuic_compile.report import render_text
    from ciuic_compile.report.text import MAX_WIDTH

    wanted = {kind: path for kind in ("json", "html", "md") if (path := getattr(args, kind)) is not None}
    inputs = steps.inputs_of(args)
    files.check(wanted.values(), inputs)
    plans = steps.plans_of(args)
    if len(plans) > 1:
        files.check([p for first in wanted.values() for p in steps.numbered(first, len(plans))], inputs)
    files.write(rendered(plans, wanted))
    columns = min(shutil.get_terminal_size((MAX_WIDTH, 24)).columns, MAX_WIDTH)
    for plan in plans:
        print(render_text(plan, args.report, columns))
    return exit_codes.PASS


def rendered(plans: tuple[Plan, ...], wanted: Mapping[str, str]) -> dict[str, str]:
    """Text by path: each plan in every kind of file that was asked for."""
    from ciuic_compile import report

    renderers: dict[str, Callable[[Plan], str]] = {
        "json": report.to_json,
        "html": report.render_html,
        "md": report.to_markdown,
    }
    texts: dict[str, str] = {}
    for kind, first in wanted.items():
        for plan, path in zip(plans, steps.numbered(first, len(plans)), strict=True):
            texts[path] = texts.get(path, "") + renderers[kind](plan)
    return texts
