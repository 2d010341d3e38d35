"""``ciuic explain``: say what is alive at the peak, and why a tensor is kept, compressed or recomputed."""

from __future__ import annotations

import argparse
import shutil
from typing import Any

from ciuic_compile.cli import exit_codes, new_parser, steps

EXAMPLES = """
ciuic explain train.py:make_model --device h200
ciuic explain train.py:make_model train.py:12
ciuic explain train.py:make_model "blocks.*.mlp" --mode 6:1
ciuic explain path/to/llama model.layers.3.self_attn --dtype bfloat16
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic explain``."""
    parser = new_parser(
        subparsers,
        "explain",
        "say what is alive at the peak, or why a tensor gets what it gets",
        EXAMPLES,
        "Without TENSOR: what is alive at the planned peak, and from which lines. With it: what is done with "
        "each tensor that it names, why, what that costs, and what would change it.",
    )
    steps.add_target(parser)
    parser.add_argument(
        "tensor",
        nargs="?",
        metavar="TENSOR",
        help="a tensor's name, its module (* ? as in fnmatch) or FILE:LINE",
    )
    parser.set_defaults(optional="tensor")
    steps.add_plan_options(parser)


def run(args: argparse.Namespace) -> int:
    """Plan, explain."""
    from ciuic_compile.report.explain import explain_peak, explain_tensor, nothing_named

    plans = steps.plans_of(args)
    width = max(80, shutil.get_terminal_size((120, 24)).columns)
    if args.tensor is None:
        for plan in plans:
            print(explain_peak(plan, width))
        return exit_codes.PASS
    found = 0
    for plan in plans:
        try:
            print(explain_tensor(plan, args.tensor, width))
            found += 1
        except LookupError:
            continue
    if not found:
        raise nothing_named(args.tensor, plans)
    return exit_codes.PASS
