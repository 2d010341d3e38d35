"""Two Llama shapes in bf16 against Inductor: saved bytes, peak, step time, gradient error.

    python -m bench.llama_shapes --out bench/results/llama_shapes-h200.json   # measured, a process a shape
    python -m bench.llama_shapes --plan [--replay]                            # planned, without a GPU

d 4096, feed-forward 11,008, vocabulary 32,000. ``--plan`` needs a CUDA build of torch, as
:mod:`bench.generated` does, and neither a GPU nor the memory: weights are never written. It prints what is
alive at the simulated peaks; ``--replay`` also generates Inductor's code and replays what that allocates.
Peaks are above parameters and inputs, the new gradients included, without an optimizer.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import time
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch

import ciuic_compile
from bench import common, measure
from bench.language import Llama, TransformerConfig
from bench.models import WithLoss
from bench.step_time import WithLossView, build, footprint, ratio, step_of, take_turns
from ciuic_compile import analyze
from ciuic_compile.config import set_default_config
from ciuic_compile.devices import named
from ciuic_compile.simulate import simulate

LLAMA = {"d": 4096, "heads": 32, "kv_heads": 32, "ff": 11008, "vocab": 32000}
TOY = {"d": 128, "heads": 4, "kv_heads": 4, "ff": 344, "vocab": 512}
SEQ = 2048
SHAPES = ("16x16384", "4x65536")  # layers x tokens
CONFIGS = ("inductor", "lossless", "4:1", "5:1")
WARMUP = 2
MIB = 2**20


def shape_of(name: str, seq: int, toy: bool = False) -> dict[str, int]:
    """The transformer of a name such as "16x16384"."""
    layers, tokens = map(int, name.split("x"))
    widths = TOY if toy else LLAMA
    return {"layers": layers, **widths, "seq": min(seq, tokens), "batch": max(1, tokens // seq)}


# ---------------------------------------------------------------- measured


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure every configuration on one shape: all are compiled in this process, then take turns."""
    model, inputs, targets, device = build(spec)
    set_default_config({"report": "off"})
    torch._dynamo.config.recompile_limit = 2 * len(spec["configs"]) + 8
    results: dict[str, dict[str, Any]] = {}
    steps = {}
    reference: dict[str, torch.Tensor] = {}
    for config in spec["configs"]:
        before = len(ciuic_compile.plans())
        start = time.perf_counter()
        run = common.compile_as(WithLossView(model), config)
        step = steps[config] = step_of(model, run, inputs, targets)
        step()
        compile_s = time.perf_counter() - start
        reference = reference or measure.gradients(model)  # of the first configuration: Inductor's
        error = measure.gradient_error(reference, measure.gradients(model))
        for _ in range(WARMUP):
            step()
        taken = footprint(model, run, inputs, targets)
        results[config] = {**taken, "error": asdict(error), "compile_s": round(compile_s, 1)}
        for plan in ciuic_compile.plans()[before:]:
            results[config] |= {
                "planned_saved": plan.planned_saved_bytes,
                "planned_peak": plan.planned_peak_bytes,
                "planned_error": plan.gradient_error,
                "notes": list(plan.notes),
            }
    times = take_turns(steps, device, spec["steps"])
    for config, result in results.items():
        result["step_ms"] = statistics.median(times[config])
        result["x"] = ratio(times[spec["configs"][0]], times[config])
    return {"results": results, "step_ms_all": times}


# ---------------------------------------------------------------- planned


def planned(shape: TransformerConfig, config: str, replay: bool) -> dict[str, Any]:
    """Plan one configuration on a pretended H200; "inductor" is its own partition of the same graph."""
    from bench.alive import at_peaks
    from bench.generated import own_partition, rewritten
    from bench.simulated import replayed

    with torch.device("meta"):
        model = WithLoss(Llama(shape)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")  # pages that nobody writes take no memory
    ids = torch.zeros(shape.batch, shape.seq, dtype=torch.int64)
    mode, *pairs = ("lossless" if config == "inductor" else config).split()
    options = {key: ast.literal_eval(value) for key, value in (p.split("=", 1) for p in pairs)}
    start = time.perf_counter()
    with mock.patch.object(analyze, "profile_for", return_value=named("h200")):
        made = rewritten(model, mode, ids, ids.clone(), **options)
    seconds = time.perf_counter() - start
    plan, graphs = made.plan, made.graphs
    ours = config != "inductor"
    if not ours:
        graphs = own_partition(made.model.original or made.model)
    pair = graphs.forward.graph, graphs.backward.graph
    peaks = simulate(*pair, graphs.num_fwd_outputs, reorder=ours)
    result = {
        "saved": peaks.saved,
        "peak": peaks.peak,
        "forward": peaks.forward,
        "backward": peaks.backward,
        "planned_error": plan.gradient_error if ours else 0.0,
        "notes": list(plan.notes) if ours else [],
        "plan_s": round(seconds, 1),
    }
    for phase, at in at_peaks(graphs, peaks).items():
        total, saved, returned = (b / MIB for b in (at.nbytes, at.share("saved"), at.share("returned")))
        largest = [f"{a.nbytes / MIB:8.1f} {a.node.name} ({a.line})" for a in at.alive if a.what == "made"]
        head = f"at {at.kernel[0]}: {total:.0f} MiB, of it saved {saved:.0f}, returned {returned:.0f}"
        result[f"alive_{phase}"] = [head, *largest[:8]]
    if replay:
        step = replayed(graphs, by_last=ours and made.by_last)
        result |= {
            "simulated": peaks.peak,
            "peak": step.peak,
            "forward": step.forward,
            "backward": step.backward,
        }
    return result


# ---------------------------------------------------------------- both


def rows(name: str, results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """One line a configuration; "less" is against the first one."""
    base = next(iter(results.values()))
    return [
        [
            f"{name} {config}",
            common.mib(r["saved"]),
            f"{base['saved'] / r['saved']:.2f}",
            common.mib(r["peak"]),
            f"{base['peak'] / r['peak']:.2f}",
            common.mib(r.get("planned_peak")),
            f"{r['step_ms']:.1f}" if "step_ms" in r else "-",
            f"{r['x']:.3f}" if "x" in r else "-",
            f"{r['planned_error']:.4f}" if "planned_error" in r else "-",
            f"{r['error']['whole']:.4f}" if "error" in r else "-",
            f"{r['error']['worst']:.4f}" if "error" in r else "-",
        ]
        for config, r in results.items()
    ]


COLUMNS = (
    "", "saved MiB", "less", "peak MiB", "less", "planned", "step ms", "x", "stated err", "grad err", "worst",
)  # fmt: skip


def main() -> None:
    """Plan or measure every shape in every configuration, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="layers x tokens")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), help="first: what all is against")
    parser.add_argument("--seq", type=int, default=SEQ)
    parser.add_argument("--toy", action="store_true", help="narrow, to try the script")
    parser.add_argument("--plan", action="store_true", help="on a CPU, for an H200")
    parser.add_argument("--replay", action="store_true", help="with --plan: of Inductor's code")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--timeout", type=float, default=580.0, help="seconds a shape may take")
    parser.add_argument("--device")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(json.loads(args.cell))))
        return
    device = torch.device("cpu") if args.plan else common.pick_device(args.device)
    found: dict[str, dict[str, Any]] = {}
    for name in args.shapes:
        shape = shape_of(name, args.seq, args.toy)
        if args.plan:
            results = {c: planned(TransformerConfig(**shape), c, args.replay) for c in args.configs}
            found[name] = {"results": results}
            for config, r in results.items():
                print(f"\n{name} {config}: planned in {r['plan_s']} s", *r["notes"], sep="\n  ")
                for phase in ("forward", "backward"):
                    print(f"  {phase}", *r[f"alive_{phase}"], sep="\n    ", flush=True)
            continue
        spec = {"shape": shape, "device": str(device), "steps": args.steps}
        done = common.run_cell("bench.llama_shapes", {**spec, "configs": args.configs}, args.timeout)
        found[name] = done
        print(f"{name}:", done.get("failed", "done"), flush=True)
        common.write_json(args.out, {"environment": common.environment(device), "shapes": found})
    common.write_json(args.out, {"environment": common.environment(device), "shapes": found})
    for name, done in found.items():
        for config, r in done.get("results", {}).items():
            for note in r.get("notes", []) if not args.plan else []:
                print(f"{name} {config}: {note}")
    lines = [row for name, done in found.items() if "results" in done for row in rows(name, done["results"])]
    common.table("planned for an H200" if args.plan else f"measured on {device}", COLUMNS, lines)


if __name__ == "__main__":
    main()
