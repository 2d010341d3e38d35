"""What is allocated at the measured peak of a step, by size and by line of Inductor's code.

    python -m bench.history --model resnet50 --batch 256 --budget 3670MiB

On a GPU: the allocator's history of one step is played up to its peak. Blocks may be larger than what was
asked for (the allocator does not split them), and only what Inductor's code allocates is in a plan's replay:
both are told apart here.
"""

from __future__ import annotations

import argparse
import linecache
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import ciuic_compile
from bench import common, measure
from bench.budgets import made
from bench.models import MODELS
from bench.step_time import WithLossView, step_of


@dataclass(frozen=True)
class Held:
    """Blocks of one size that one line of code asked for, alive at the peak."""

    count: int
    nbytes: int
    line: str


def line_of(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost line of Python behind an allocation; of generated code, the line itself."""
    for frame in frames:
        name, number = str(frame["filename"]), int(frame["line"])
        if name.endswith(".py"):
            return f"{name.rsplit('/', 1)[-1]}:{number} {linecache.getline(name, number).strip()}"
    return "?"


def at_peak(events: Iterable[Mapping[str, Any]]) -> tuple[int, list[Held], str]:
    """Bytes asked for at the most, the blocks that they are, largest first, and the last line before it.

    Args:
        events: of a device's trace in ``torch.cuda.memory._snapshot()``.
    """
    alive: dict[int, tuple[int, str]] = {}
    total, most, there, where = 0, 0, Counter[tuple[int, str]](), "?"
    for event in events:
        if event["action"] == "alloc":
            alive[event["addr"]] = (event["size"], line_of(event["frames"]))
            total += event["size"]
            if total > most:
                most, there, where = total, Counter(alive.values()), alive[event["addr"]][1]
        elif event["action"] == "free_requested" and event["addr"] in alive:
            total -= alive.pop(event["addr"])[0]
    held = [Held(count, size, line) for (size, line), count in there.items()]
    return most, sorted(held, key=lambda h: -h.nbytes * h.count), where


def main() -> None:
    """Measure, and print the blocks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50", choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--backend", default="ciuic", choices=("ciuic", "inductor"))
    parser.add_argument("--mode", default="lossless")
    parser.add_argument("--budget")
    parser.add_argument("--rows", type=int, default=40)
    args = parser.parse_args()
    device = common.pick_device("cuda")
    model, inputs, targets, device = made({"model": args.model, "batch": args.batch, "device": str(device)})
    options = {"mode": args.mode, "report": "off"} | ({"budget": args.budget} if args.budget else {})
    kwargs: dict[str, Any] = {"options": options} if args.backend == "ciuic" else {}
    run = torch.compile(WithLossView(model), backend=args.backend, **kwargs)
    step = step_of(model, common.under_autocast(run, "autocast", device), inputs, targets)
    for _ in range(2):
        step()
    for plan in ciuic_compile.plans():
        planned, simulated = map(common.mib, (plan.planned_peak_bytes, plan.simulated_peak_bytes))
        print(f"planned {planned}, simulated {simulated}")
    model.zero_grad(set_to_none=True)
    asked = "requested_bytes.all"
    with measure.peak(device) as peak:
        before = torch.cuda.memory_stats(device)[f"{asked}.current"]
        step()
    requested = torch.cuda.memory_stats(device)[f"{asked}.peak"] - before
    model.zero_grad(set_to_none=True)
    torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python")
    step()
    torch.cuda.synchronize(device)
    traces = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(enabled=None)
    most, held, where = at_peak(next(t for t in traces if t))
    what = f"measured peak {common.mib(peak.nbytes)}, of it asked for {common.mib(requested)}"
    print(f"{what}; in the history {common.mib(most)}, reached at {where}")
    rows = [
        [str(h.count), f"{h.nbytes / 2**20:.3f}", common.mib(h.count * h.nbytes), h.line[:110]] for h in held
    ]
    common.table("alive at the peak", ("blocks", "MiB each", "MiB", "asked for by"), rows[: args.rows])


if __name__ == "__main__":
    main()
