"""``ciuic diff``: what two plans, baselines or targets differ in."""

from __future__ import annotations

import argparse
from typing import Any

from ciuic_compile.cli import exit_codes, files, gate, new_parser

EXAMPLES = """
ciuic diff old-plan.json new-plan.json
ciuic diff ciuic-baseline.json train.py:make_model
ciuic diff main/ciuic-baseline.json ciuic-baseline.json --format md
ciuic diff train.py:small train.py:large --device h200
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic diff``."""
    parser = new_parser(subparsers, "diff", "say what two plans, baselines or targets differ in", EXAMPLES)
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help="a plan's JSON, a baseline, or a target")
    parser.add_argument("--mode", help="mode that targets are planned with (default: 4:1)")
    parser.add_argument("--device", help="device that targets are planned for")
    parser.add_argument("--budget", help="budget that targets are planned with")
    gate.add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Compare, and say it; the exit status is 0 whatever the difference."""
    from ciuic_compile.gate import diff
    from ciuic_compile.gate.formats import Outcome

    files.check(
        [args.output], [args.a, args.b, *files.read_for(args.a), *files.read_for(args.b, device=args.device)]
    )
    options = {key: value for key in ("mode", "budget") if (value := getattr(args, key)) is not None}
    checks, notes = diff.compare(args.a, args.b, options, args.device)
    gate.show(Outcome("diff", checks, exit_codes.PASS, notes), args)
    return exit_codes.PASS
