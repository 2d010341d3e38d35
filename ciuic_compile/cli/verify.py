"""``ciuic verify``: run a step and compare the measured peak with the plan."""

from __future__ import annotations

import argparse
from typing import Any

from ciuic_compile.cli import exit_codes, files, new_parser, steps

EXAMPLES = """
ciuic verify train.py:make_model
ciuic verify train.py:make_model --mode 6:1 --autocast bfloat16 --tolerance 0.03
ciuic verify path/to/llama --batch 2 --seq 1024 --dtype bfloat16 --on cuda:1
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic verify``."""
    parser = new_parser(
        subparsers,
        "verify",
        "run a step and compare the measured peak with the plan",
        EXAMPLES,
        "The model is really made and run, on a GPU where there is one. Exit status 5: the measured peak "
        "is off the plan's by more than the tolerance.",
    )
    steps.add_target(parser)
    steps.add_plan_options(parser)
    parser.add_argument("--on", metavar="DEVICE", help="cuda, cuda:1 or cpu (default: a GPU if there is one)")
    parser.add_argument(
        "--tolerance",
        type=_share,
        default=0.05,
        metavar="X",
        help="share of the measured peak (0.05)",
    )


def run(args: argparse.Namespace) -> int:
    """Plan without running, run, compare."""
    from ciuic_compile import verifying
    from ciuic_compile.config import REPORT_SUFFIXES
    from ciuic_compile.devices import profile_for
    from ciuic_compile.report._format import size

    report = steps.options_of(args)["report"]
    if isinstance(report, str) and report.endswith(REPORT_SUFFIXES):
        files.check([report], steps.inputs_of(args))
    device = steps.device(args.on)
    dynamic = True if args.dynamic else None
    planned = steps.plans_of(args, profile_for(device).name)
    target = steps.load(args, allocate=device)
    measured = verifying.run_step(
        target.model,
        target.inputs,
        target.loss_fn,
        device=device,
        options=steps.options_of(args),
        autocast=args.autocast,
        dynamic=dynamic,
    )
    expected = planned[0].planned_peak_bytes
    off = expected / measured.peak_bytes - 1
    compiled = measured.plan.planned_peak_bytes
    compiled_off = compiled / measured.peak_bytes - 1
    passed = abs(off) <= args.tolerance
    print(f"ciuic verify: {args.target} | mode {planned[0].mode} | {measured.device}")
    print("  peak of a step, parameters and inputs not counted")
    print(f"    measured                      {size(measured.peak_bytes):>10}")
    print(f"    planned without running       {size(expected):>10}  {off:+.2%}")
    print(f"    planned with generated code   {size(compiled):>10}  {compiled_off:+.2%}")
    print(f"  {'within' if passed else 'NOT within'} the tolerance of {args.tolerance:.1%}")
    return exit_codes.PASS if passed else exit_codes.MEASURED_DIFFERS


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 0.05")
    return value
