"""Plans one training step of a small model and prints the plan as JSON, to compare machines and processes.

    python -m tests.plan_once OPTIONS [--on cuda] [--model llama]

``OPTIONS`` are ciuic's, as JSON. Files are named as in the repository. What machine and torch made it goes
to stderr. The graph's kernels are not generated, so the plan has no replayed figures and a note why.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

import ciuic_compile
from bench.common import ROOT, environment
from bench.models import MODELS, WithLoss
from ciuic_compile.report import to_json
from tests.training import interpreted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--on", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", choices=list(MODELS), default="llama")
    args = parser.parse_args()
    torch.manual_seed(0)
    built, batches, loss = MODELS[args.model]("small")
    model = WithLoss(built, loss).to(args.on)
    inputs = batches(0, args.on)
    with interpreted():
        torch.compile(model, backend="ciuic", options={"report": "off", **args.options})(*inputs)
    print(json.dumps(environment(args.on)), file=sys.stderr)
    print(to_json(ciuic_compile.plans()[-1]).replace(f'"{ROOT}/', '"'))


if __name__ == "__main__":
    main()
