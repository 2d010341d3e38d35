"""``ciuic calibrate``: measure what errors in saved tensors do to gradients."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from ciuic_compile.cli import exit_codes, files, new_parser, steps

EXAMPLES = """
ciuic calibrate train.py:make_model -o calibration.json
ciuic calibrate train.py:make_model -o calibration.json --autocast bfloat16
ciuic plan train.py:make_model --option calibration=calibration.json
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic calibrate``."""
    parser = new_parser(
        subparsers,
        "calibrate",
        "measure what errors in saved tensors do to gradients",
        EXAMPLES,
        "The model is really made and run op by op on the target's example inputs, which should be data: "
        "a plan with the file as its option calibration then states measured errors.",
    )
    steps.add_target(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write, .json")
    parser.add_argument("--on", metavar="DEVICE", help="cuda, cuda:1 or cpu (default: a GPU if there is one)")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="the step is under autocast")


def run(args: argparse.Namespace) -> int:
    """Measure, write."""
    import torch

    from ciuic_compile import calibrate, planning
    from ciuic_compile.errors import OutputError

    if not args.output.endswith(".json"):
        raise OutputError(f"cannot write {args.output!r}: its name does not end in .json\n  fix: name it so")
    files.check([args.output], files.read_for(args.target))
    device = steps.device(args.on)
    target = steps.load(args, allocate=device)
    model = planning.unwrapped(target.model).to(device)
    batch = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), target.inputs)
    batches: Iterable[Any] = [tuple(batch) if isinstance(batch, list) else batch]
    loss_fn = target.loss_fn
    with planning.autocast_on(device, args.autocast):
        measured = calibrate(model, batches, loss_fn, steps=1)
    files.write({args.output: measured.to_json()})
    print(f"ciuic calibrate: {len(measured.graphs)} graph(s) measured on {measured.device}; in {args.output}")
    return exit_codes.PASS
