"""Peak, saved bytes and step time of a Llama with a large vocabulary, its loss whole and in chunks.

    python -m bench.chunked_loss --device cuda              # blocks and head as in Llama 3.2 1B, fewer blocks
    python -m bench.chunked_loss --layers 0 --dtype fp32     # embedding, norm, head and loss alone

Everything is compiled in one process, then takes turns step by step: "x" is the median of the ratios to
Inductor's step in the same round. Peaks are above parameters and inputs, the new gradients included.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

import ciuic_compile
from bench import common
from bench.step_time import WithLossView, build, footprint, ratio, step_of, take_turns
from ciuic_compile.config import set_default_config

CONFIGS = ("inductor", "lossless chunk_loss=False", "lossless", "4:1 chunk_loss=False", "4:1")
SHAPES: dict[str, dict[str, int]] = {
    "cuda": {
        "layers": 4, "d": 2048, "heads": 32, "kv_heads": 8, "ff": 8192, "vocab": 128_256,
        "seq": 2048, "batch": 8,
    },
    "cpu": {
        "layers": 1, "d": 256, "heads": 4, "kv_heads": 4, "ff": 704, "vocab": 32_000, "seq": 1024, "batch": 4,
    },
}  # fmt: skip
WARMUP = 2


def measured(config: str, spec: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """What one configuration allocates, and its step."""
    model, inputs, targets, _ = build(spec)
    before = len(ciuic_compile.plans())
    run = common.compile_as(WithLossView(model), config)
    step = step_of(model, run, inputs, targets)
    for _ in range(WARMUP):
        step()
    taken = footprint(model, run, inputs, targets)
    plans = ciuic_compile.plans()[before:]
    return {
        **taken,
        "planned_saved": plans[0].planned_saved_bytes if plans else None,
        "planned_peak": plans[0].planned_peak_bytes if plans else None,
        "notes": [note for plan in plans for note in plan.notes if "chunk" in note],
    }, step


def report(results: dict[str, dict[str, Any]]) -> None:
    """The table, and what the plans say of the loss."""
    rows = [
        [
            config,
            *(common.mib(r[key]) for key in ("saved", "planned_saved", "peak", "planned_peak")),
            f"{r['step_ms']:.1f}",
            f"{r['x']:.3f}",
            f"{r['loss']:.6f}",
        ]
        for config, r in results.items()
    ]
    columns = ("", "saved MiB", "planned", "peak MiB", "planned", "step ms", "x", "loss")
    common.table("one step, forward and backward", columns, rows)
    for config, r in results.items():
        for note in r["notes"]:
            print(f"{config}: {note}")


def main() -> None:
    """Measure every configuration and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), help="first: the base of the ratios")
    for name in SHAPES["cuda"]:
        defaults = " or ".join(str(shape[name]) for shape in SHAPES.values())
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"by device: {defaults}")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    given = {name: getattr(args, name) for name in SHAPES["cuda"] if getattr(args, name) is not None}
    shape = {**SHAPES["cuda" if device.type == "cuda" else "cpu"], **given}
    spec = {"shape": shape, "device": str(device), "dtype": args.dtype}
    set_default_config({"report": "off"})
    torch._dynamo.config.recompile_limit = 2 * len(args.configs) + 8
    results: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], None]] = {}
    for config in args.configs:
        results[config], steps[config] = measured(config, spec)
    times = take_turns(steps, device, args.steps)
    for config, result in results.items():
        result["step_ms"] = statistics.median(times[config])
        result["x"] = ratio(times[args.configs[0]], times[config])
    common.write_json(
        args.out,
        {"environment": common.environment(device), **spec, "results": results, "step_ms_all": times},
    )
    print(", ".join(f"{name} {value}" for name, value in shape.items()), args.dtype, device)
    report(results)


if __name__ == "__main__":
    main()
