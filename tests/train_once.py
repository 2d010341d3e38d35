"""Trains a small model for one step; a subprocess of test_warm_start.py. Argument: options as JSON."""

from __future__ import annotations

import contextlib
import json
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ciuic_compile
from ciuic_compile.report import to_json
from tests.training import interpreted


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        out: Tensor = self.head(x)
        return out


def main() -> None:
    options = {"min_bytes": 256, **json.loads(sys.argv[1])}
    context = interpreted() if options.pop("interpret", False) else contextlib.nullcontext()
    cross_entropy = options.pop("cross_entropy", False)
    torch.manual_seed(0)
    model, targets = Net(), torch.arange(32) % 10

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), targets)

    run = loss if cross_entropy else model
    with context:
        result = torch.compile(run, backend="ciuic", options=options)(torch.randn(32, 64))
        (result if cross_entropy else result.square().mean()).backward()
    found = counters["aot_autograd"]
    print(
        json.dumps(
            {
                "hits": found["autograd_cache_hit"],
                "misses": found["autograd_cache_miss"],
                "plans": [to_json(p) for p in ciuic_compile.plans()],
                "gradients": [
                    p.grad.double().norm().item() for p in model.parameters() if p.grad is not None
                ],
            }
        )
    )


main()
