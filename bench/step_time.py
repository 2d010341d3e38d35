"""Step time, saved bytes and peak of a Llama-shaped model in bf16, beside what torch itself offers.

Each configuration runs in a fresh process. Time ratios come from one more process, in which Inductor and
ciuic take turns step by step: that is what a claim about speed rests on. The peak is that of a forward and
backward above the parameters, with no gradients at its start: the new gradients count. No optimizer.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from bench import common, measure
from bench.language import Llama, TransformerConfig
from bench.models import WithLoss, text_batches

CONFIGS = ("eager", "inductor", "lossless", "2:1", "4:1", "budget-0.5", "budget-0.25", "fp8")
SMALL = {"layers": 2, "d": 128, "heads": 4, "kv_heads": 4, "ff": 344, "vocab": 512, "seq": 64, "batch": 2}


def build(spec: dict[str, Any]) -> tuple[WithLoss, torch.Tensor, torch.Tensor, torch.device]:
    """The model (in bf16 unless ``spec`` says otherwise) and a batch, the same in every process."""
    device = torch.device(spec["device"])
    shape = TransformerConfig(**spec["shape"])
    torch.manual_seed(0)
    with device:
        model = WithLoss(Llama(shape))
    if spec.get("dtype", "bf16") == "bf16":
        model = model.to(torch.bfloat16)
    inputs, targets = text_batches(shape)(0, device)
    return model, inputs, targets, device


def step_of(model: WithLoss, run: Callable[..., torch.Tensor], *batch: torch.Tensor) -> Callable[[], None]:
    """One forward and backward that starts with no gradients."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        run(*batch).backward()

    return step


def footprint(
    model: torch.nn.Module, run: Callable[..., torch.Tensor], inputs: torch.Tensor, targets: torch.Tensor
) -> dict[str, Any]:
    """Peak and saved bytes of a step that starts with no gradients, and its loss. Warm up first."""
    model.zero_grad(set_to_none=True)
    with measure.peak(inputs.device) as peak:
        run(inputs, targets).backward()
    model.zero_grad(set_to_none=True)
    loss = run(inputs, targets)
    saved = measure.saved(loss, measure.model_tensors(model, inputs, targets)).nbytes
    return {"saved": saved, "peak": peak.nbytes, "loss": loss.item()}


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure one configuration, or several taking turns."""
    if "turns" in spec:
        return turns(spec)
    model, inputs, targets, device = build(spec)
    model(inputs, targets).backward()
    reference = {n: g.cpu() for n, g in measure.gradients(model).items()}
    run = common.compile_as(model, spec["config"])
    step = step_of(model, run, inputs, targets)
    step()
    error = measure.gradient_error(reference, {n: g.cpu() for n, g in measure.gradients(model).items()})
    for _ in range(2):
        step()
    taken = footprint(model, run, inputs, targets)
    times = measure.time_steps(step, device, spec["steps"])
    return {
        **taken,
        "step_ms": statistics.median(times),
        "step_ms_all": times,
        "error": asdict(error),
        **common.plans_summary(),
    }


def turns(spec: dict[str, Any]) -> dict[str, Any]:
    """Configurations in one process, one step each in turn, so that drift of the clock hits all alike."""
    model, inputs, targets, device = build(spec)
    steps = {}
    saved = {}
    for config in spec["turns"]:
        run = common.compile_as(WithLossView(model), config)
        steps[config] = step_of(model, run, inputs, targets)
        for _ in range(3):
            steps[config]()
        model.zero_grad(set_to_none=True)
        loss = run(inputs, targets)  # shows in the results that each one did run its own graph
        saved[config] = measure.saved(loss, measure.model_tensors(model, inputs, targets)).nbytes
        del loss
    times = take_turns(steps, device, spec["steps"])
    return {
        "step_ms": {c: statistics.median(t) for c, t in times.items()},
        "ratio": {c: ratio(times[spec["turns"][0]], t) for c, t in times.items()},
        "saved": saved,
        "step_ms_all": times,
    }


def take_turns(
    steps: dict[str, Callable[[], None]], device: torch.device, rounds: int, burst: int = 1
) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; each round has an order of its own, the same in every run.

    Args:
        burst: steps in a row, as in training; the first of several waits for the host and does not count.
    """
    times: dict[str, list[float]] = {config: [] for config in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(rounds):
        for config in order:
            found = measure.time_steps(steps[config], device, burst)
            times[config].append(statistics.fmean(found[burst > 1 :]))
        shuffle(order)
    return times


def ratio(base: list[float], other: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(b / a for a, b in zip(base, other, strict=True))


class WithLossView(torch.nn.Module):
    """The same parameters behind another module, so that each configuration compiles on its own."""

    def __init__(self, model: WithLoss) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(inputs, targets)
        return loss


def report(results: list[dict[str, Any]], alternating: dict[str, Any]) -> None:
    """The table; ratios are to Inductor."""
    ratios = alternating.get("ratio", {})
    base = next((r for r in results if r["config"] == "inductor" and "saved" in r), None)
    rows = []
    for r in results:
        if "failed" in r:
            rows.append([r["config"], "failed", *["-"] * 7])
            continue
        turn = ratios.get(r["config"])
        rows.append(
            [
                r["config"],
                common.mib(r["saved"]),
                f"{base['saved'] / r['saved']:.2f}" if base and r["saved"] else "-",
                common.mib(r["peak"]),
                f"{base['peak'] / r['peak']:.2f}" if base and r["peak"] else "-",
                f"{r['step_ms']:.2f}",
                "-" if turn is None else f"{turn:.3f}",
                common.share(r["error"]["whole"]),
                common.share(r["error"]["worst"]),
            ]
        )
    columns = ("", "saved MiB", "less", "peak MiB", "less", "step ms", "x (turns)", "grad err", "worst")
    common.table("one step; gradients against eager in bf16", columns, rows)
    if "failed" in alternating:
        print("taking turns failed:", alternating["failed"])


def main() -> None:
    """Run the cells and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--turns", nargs="*", default=["inductor", "lossless", "4:1"], help="first: the base")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--ff", type=int, default=11008)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="a toy shape, to try the script on a CPU")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a cell may take")
    parser.add_argument("--device")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(json.loads(args.cell))))
        return
    device = common.pick_device(args.device)
    shape = SMALL if args.small else {name: getattr(args, name) for name in SMALL}
    shared = {"shape": shape, "device": str(device), "steps": args.steps}
    specs: list[dict[str, Any]] = [{"config": config, **shared} for config in args.configs]
    if len(args.turns) > 1:
        specs.append({"config": "turns", "turns": args.turns, **shared})
    results = common.run_cells("bench.step_time", specs, args.timeout, 1, lambda s: str(s["config"]))
    alternating = results.pop() if len(args.turns) > 1 else {}
    command = shlex.join(["python", "-m", "bench.step_time", *sys.argv[1:]])
    found = {"environment": common.environment(device), "command": command}
    common.write_json(args.out, {**found, "results": results, "turns": alternating})
    report(results, alternating)


if __name__ == "__main__":
    main()
