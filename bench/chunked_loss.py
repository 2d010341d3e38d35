"""Peak, saved bytes and step time of a large-vocabulary head and its loss, whole and in chunks.

    python -m bench.chunked_loss --tokens 4096 --vocab 32000 --d 256 --dtype bf16

One process a row. The model is an embedding, a linear layer in a skip connection, LayerNorm, the head and the
mean cross entropy in float32: little else that could set the peak. Peaks are above parameters and inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common, measure

CONFIGS = ("inductor", "lossless", "lossless chunk_loss='auto'", "4:1", "4:1 chunk_loss='auto'")


class Head(nn.Module):
    """Token ids and targets to the mean cross entropy."""

    def __init__(self, vocab: int, d: int) -> None:
        super().__init__()
        self.tokens, self.layer, self.norm = nn.Embedding(vocab, d), nn.Linear(d, d), nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids)
        logits: Tensor = self.head(self.norm(x + torch.tanh(self.layer(x))))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one configuration."""
    device = torch.device(spec["device"])
    torch.manual_seed(0)
    model = Head(spec["vocab"], spec["d"]).to(device)
    if spec["dtype"] == "bf16":
        model = model.bfloat16()
    shape = (4, spec["tokens"] // 4)
    ids, targets = (torch.randint(spec["vocab"], shape).to(device) for _ in range(2))
    compiled = common.compile_as(model, spec["config"])

    def step() -> None:
        compiled(ids, targets).backward()
        model.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    with measure.peak(device) as peak:
        compiled(ids, targets).backward()
    model.zero_grad(set_to_none=True)
    loss = compiled(ids, targets)
    held = measure.saved(loss, measure.model_tensors(model, ids, targets))
    loss.backward()
    model.zero_grad(set_to_none=True)
    times = measure.time_steps(step, device, spec["steps"])
    return {
        "loss": loss.item(),
        "saved": held.nbytes,
        "peak": peak.nbytes,
        "step_ms": statistics.median(times),
        **common.plans_summary(),
    }


def main() -> None:
    """Measure every configuration and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    if args.cell:
        spec = json.loads(args.cell)
        print(json.dumps({**spec, **cell(spec)}))
        return
    shared = {k: getattr(args, k) for k in ("tokens", "vocab", "d", "dtype", "steps")}
    shared["device"] = str(common.pick_device(args.device))
    results = [common.run_cell("bench.chunked_loss", {**shared, "config": c}, 500.0) for c in args.configs]
    for r in results:
        if "failed" in r:
            print(r["config"], "failed:", r["failed"])
            continue
        sizes = [
            f"{r.get(k, 0) / measure.MIB:.1f}" for k in ("saved", "peak", "planned_saved", "planned_peak")
        ]
        print(f"{r['config']:28} saved, peak, planned saved, planned peak MiB: {', '.join(sizes)};", end=" ")
        print(f"{r['step_ms']:.1f} ms; loss {r['loss']:.6f}")


if __name__ == "__main__":
    main()
