"""Which kernels a step spends its time in: one model, several configurations, GPU only.

Each configuration runs in a fresh process under torch's profiler. Times are sums over a step of what the GPU
was busy with, the median of several steps; the table is sorted by how much a kernel differs from the first
configuration's. Kernels of one purpose have other names in other graphs, so totals by kind come first.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import common
from bench.models import MODELS, WithLoss
from bench.step_time import build as build_llama_layers
from bench.step_time import step_of

KINDS = (
    ("codec", r"^(en|de)code_"),
    ("attention", r"flash|fmha|attention"),
    ("matmul", r"gemm|cutlass|cublas|nvjet|splitk|sm90_xmma|wgmma"),
    ("convolution", r"conv|cudnn|wgrad|dgrad|implicit"),
    ("fused", r"^triton_"),
)


def kind(name: str) -> str:
    """The kind of a kernel by its name."""
    return next((k for k, pattern in KINDS if re.search(pattern, name)), "other")


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds a step of every kernel, and how often it ran."""
    device = torch.device("cuda")
    if spec["model"] == "llama-layers":
        model, inputs, targets, device = build_llama_layers(spec)
    else:
        torch.manual_seed(0)
        built, batches, loss_fn = MODELS[spec["model"]](spec["size"], batch=spec["batch"])
        model = WithLoss(built, loss_fn).to(device)
        inputs, targets = batches(0, device)
    run = common.compile_as(model, spec["config"])
    step = step_of(model, run, inputs, targets)

    def autocast_step() -> None:
        with common.autocast(spec["precision"], device):
            step()

    for _ in range(3):
        autocast_step()
    return {"kernels": profiled(autocast_step, spec["steps"])}


def by_kind(kernels: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Milliseconds of each kind of kernel."""
    sums = dict.fromkeys([*(k for k, _ in KINDS), "other"], 0.0)
    for name, (ms, _) in kernels.items():
        sums[kind(name)] += ms
    return sums


def profiled(step: Callable[[], None], count: int) -> dict[str, tuple[float, int]]:
    """Milliseconds that each kernel is busy in a step, the median of ``count`` steps, and its calls."""
    steps = []
    for _ in range(count):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            step()
            torch.cuda.synchronize()
        times: dict[str, list[float]] = defaultdict(list)
        assert seen.profiler is not None and seen.profiler.kineto_results is not None
        for event in seen.profiler.kineto_results.events():
            if "cuda" in str(event.device_type()).lower():
                times[event.name()].append(event.duration_ns() / 1e6)
        steps.append(times)
    names = {name for times in steps for name in times}
    return {
        n: (statistics.median(sum(s.get(n, [0.0])) for s in steps), len(steps[0].get(n, []))) for n in names
    }


def report(results: list[dict[str, Any]], top: int) -> None:
    """Totals by kind, then the kernels that differ most from the first configuration's."""
    done = [r for r in results if "kernels" in r]
    for r in results:
        if "failed" in r:
            print(f"{r['config']}: {r['failed']}")
    kinds = [by_kind(r["kernels"]) for r in done]
    rows = [[name, *(f"{sums[name]:.2f}" for sums in kinds)] for name in [*(k for k, _ in KINDS), "other"]]
    rows.append(["all", *(f"{sum(sums.values()):.2f}" for sums in kinds)])
    common.table("milliseconds a step by kind", ["", *(r["config"] for r in done)], rows)
    for r in done[1:]:
        base = done[0]["kernels"]
        by_gain = sorted(r["kernels"].items(), key=lambda item: base.get(item[0], [0.0])[0] - item[1][0])
        table = [[n[:90], str(c), f"{t:.3f}", f"{base.get(n, [0.0])[0]:.3f}"] for n, (t, c) in by_gain[:top]]
        common.table(f"{r['config']}: slower by most", ("kernel", "calls", "ms", "before"), table)
    if done:
        only = {n: v for n, v in done[0]["kernels"].items() if all(n not in r["kernels"] for r in done[1:])}
        gone = sorted(only.items(), key=lambda item: -item[1][0])[:top]
        common.table(
            f"only in {done[0]['config']}", ("kernel", "calls", "ms"),
            [[n[:90], str(c), f"{t:.3f}"] for n, (t, c) in gone],
        )  # fmt: skip


def main() -> None:
    """Run the cells and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="llama-layers", choices=["llama-layers", *MODELS])
    parser.add_argument("--size", default="full", choices=("tiny", "small", "medium", "full"))
    parser.add_argument("--batch", type=int, help="samples; default: the size's own")
    parser.add_argument("--configs", nargs="+", default=["inductor", "4:1"])
    parser.add_argument("--precision", default="fp32", choices=common.PRECISIONS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--top", type=int, default=14, help="kernels to list")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(json.loads(args.cell))))
        return
    shape = {"layers": 4, "d": 4096, "heads": 32, "kv_heads": 32, "ff": 11008, "vocab": 32000}
    shape |= {"seq": 2048, "batch": 4}
    specs = [
        {
            "model": args.model,
            "config": config,
            "size": args.size,
            "batch": args.batch,
            "precision": args.precision,
            "steps": args.steps,
            "shape": shape,
            "device": "cuda",
        }
        for config in args.configs
    ]
    results = common.run_cells("bench.kernel_times", specs, args.timeout, 1, lambda s: str(s["config"]))
    common.write_json(args.out, {"environment": common.environment(torch.device("cuda")), "results": results})
    report(results, args.top)


if __name__ == "__main__":
    main()
