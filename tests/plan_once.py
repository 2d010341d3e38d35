"""Plans one training step of a small Llama and prints the plan as JSON; arguments: options as JSON."""

from __future__ import annotations

import json
import sys

import torch

import ciuic_compile
from bench.models import MODELS, WithLoss
from ciuic_compile.report import to_json
from tests.training import interpreted


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.manual_seed(0)
    built, batches, loss = MODELS["llama"]("small")
    inputs = batches(0, torch.device("cpu"))
    with interpreted():
        torch.compile(WithLoss(built, loss), backend="ciuic", options={"report": "off", **options})(*inputs)
    print(to_json(ciuic_compile.plans()[-1]))


if __name__ == "__main__":
    main()
