"""How far from the optimum plans under a budget may be: every bench model, planned for a GPU without one.

    python -m bench.gaps --device h100 --shares 1.3 1.0 0.85
    python -m bench.gaps --models llama --batch 32 --budgets 3004MiB 2839MiB

Budgets are shares of the peak of the lossless plan without one. "cost" is what the plan takes beyond
Inductor's own choice, by the time model; the gap is the optimiser's certificate (docs/budgets.md).
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from bench import common
from bench.models import MODELS, WithLoss
from ciuic_compile import Plan, planning
from ciuic_compile.config import parse_size
from ciuic_compile.errors import InfeasibleBudgetError

COLUMNS = ("model", "budget MiB", "peak", "cost us", "gap %", "deadline", "CPU s")


def planned(name: str, args: argparse.Namespace, options: dict[str, Any]) -> Plan:
    """The plan of one autocast step of a bench model."""
    built, batches, loss = MODELS[name](args.size, args.batch)
    inputs = batches(0, torch.device("cpu"))
    (plan,) = planning.plan(
        WithLoss(built, loss), inputs, options=options, device=args.device, autocast="bfloat16"
    )
    return plan


def rows_of(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a budget."""
    budgets = [parse_size("--budgets", b) for b in args.budgets or ()]
    if not budgets:
        free = planned(name, args, {"mode": "lossless"})
        budgets = [int(share * free.planned_peak_bytes) for share in args.shares]
    rows = []
    for budget in budgets:
        start = time.process_time()
        row: dict[str, Any] = {"model": name, "budget": budget}
        try:
            plan = planned(name, args, {"mode": args.mode, "budget": budget})
        except InfeasibleBudgetError as error:
            rows.append(row | {"smallest": error.smallest_bytes})
            continue
        row |= {"peak": plan.planned_peak_bytes, "time_us": plan.time_us, "gap": plan.gap}
        struck = any("deadline" in note for note in plan.notes)
        rows.append(row | {"struck": struck, "seconds": time.process_time() - start})
    return rows


def main() -> None:
    """Plan and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--size", default="medium", choices=("tiny", "small", "medium", "full"))
    parser.add_argument("--device", default="h100")
    parser.add_argument("--mode", default="lossless")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.3, 1.0, 0.85])
    parser.add_argument("--budgets", nargs="+", help="these instead, such as 3004MiB")
    parser.add_argument("--batch", type=int, help="samples; default: the model's own")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    rows = [row for name in args.models for row in rows_of(name, args)]
    found = [r for r in rows if "gap" in r]
    lines = [
        [r["model"], common.mib(r["budget"]), common.mib(r["peak"]), f"{r['time_us']:.0f}",
         f"{100 * r['gap']:.2f}", "struck" if r["struck"] else "", f"{r['seconds']:.1f}"]
        if "gap" in r
        else [r["model"], common.mib(r["budget"]), f"smallest {common.mib(r['smallest'])}", *["-"] * 4]
        for r in rows
    ]  # fmt: skip
    common.table("gaps of plans under a budget", COLUMNS, lines)
    if found:
        median = statistics.median(r["gap"] for r in found)
        print(f"median gap {median:.2%}, worst {max(r['gap'] for r in found):.2%}, {len(found)} plans")
    common.write_json(args.out, {"environment": common.environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
