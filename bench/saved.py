"""Measured saved bytes, peak and gradient error of every model in every configuration.

Each cell runs in a fresh process. Saved bytes are counted on the autograd graph between forward and backward
(:mod:`bench.measure`); the peak is that of one forward and backward above parameters, with no gradients at
its start, so the new gradients count. The gradient is compared with eager's in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from bench import common, measure
from bench.models import MODELS, WithLoss

CONFIGS = ("inductor", "lossless", "2:1", "4:1")


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one model in one configuration."""
    device = torch.device(spec["device"])
    precision: str = spec["precision"]
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS[spec["model"]](spec["size"])
    model = WithLoss(built, loss_fn).to(device)
    inputs, targets = batches(0, device)

    model(inputs, targets).backward()
    reference = measure.gradients(model)
    model.zero_grad(set_to_none=True)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
        inputs = inputs.to(torch.bfloat16) if inputs.is_floating_point() else inputs
    compiled = common.compile_as(model, spec["config"])

    def forward() -> torch.Tensor:
        with common.autocast(precision, device):
            return compiled(inputs, targets)

    def step() -> None:
        forward().backward()
        model.zero_grad(set_to_none=True)

    first = forward()
    first.backward()
    error = measure.gradient_error(reference, measure.gradients(model))
    loss = first.item()
    del first, reference
    model.zero_grad(set_to_none=True)

    with measure.peak(device) as peak:
        forward().backward()
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    kept = forward()
    saved = measure.saved(kept, measure.model_tensors(model, inputs, targets))
    after = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    kept.backward()
    times = measure.time_steps(step, device, spec["steps"])
    return {
        "loss": loss,
        "saved": saved.nbytes,
        "saved_count": saved.count,
        "allocated_after_forward": None if after is None else after - before,
        "peak": peak.nbytes,
        "step_ms": statistics.median(times),
        "error": asdict(error),
        **common.plans_summary(),
    }


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table of the results."""
    base = {(r["model"], r["precision"]): r for r in results if r["config"] == "inductor" and "saved" in r}
    lines = []
    for r in results:
        name = f"{r['model']} {r['precision']}"
        if "failed" in r:
            lines.append([name, r["config"], "failed", *["-"] * 6])
            continue
        inductor = base.get((r["model"], r["precision"]))
        ratio = f"{inductor['saved'] / r['saved']:.2f}" if inductor and r["saved"] else "-"
        error = r["error"]
        lines.append(
            [
                name,
                r["config"],
                common.mib(r["saved"]),
                ratio,
                common.mib(r["peak"]),
                common.share(error["whole"]),
                common.share(error["worst"]),
                common.share(r.get("planned_error_bound")),
                str(len(error["tiny"])),
            ]
        )
    return lines


COLUMNS = ("model", "as", "saved MiB", "ratio", "peak MiB", "grad err", "worst", "stated <=", "tiny")


def main() -> None:
    """Run the cells asked for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument(
        "--configs", nargs="+", default=list(CONFIGS), help="inductor, eager, or ciuic's modes"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=common.PRECISIONS, help="default: autocast on a GPU"
    )
    parser.add_argument(
        "--size", choices=("tiny", "small", "full"), help="default: full on a GPU, else small"
    )
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time (times are then worthless)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a cell may take")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(json.loads(args.cell))))
        return
    device = common.pick_device(args.device)
    gpu = device.type == "cuda"
    specs = [
        {
            "model": model,
            "config": config,
            "precision": precision,
            "size": args.size or ("full" if gpu else "small"),
            "device": str(device),
            "steps": args.steps,
        }
        for model, precision, config in product(
            args.models, args.precision or ["autocast" if gpu else "fp32"], args.configs
        )
    ]
    results = common.run_cells(
        "bench.saved",
        specs,
        args.timeout,
        args.jobs,
        lambda s: f"{s['model']} {s['precision']} {s['config']}",
    )
    common.write_json(args.out, {"environment": common.environment(device), "results": results})
    common.table("saved from forward to backward, measured", COLUMNS, rows(results))


if __name__ == "__main__":
    main()
