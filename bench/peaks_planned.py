"""What plans made without a GPU say of cells that bench.peaks has measured on one.

    python -m bench.peaks_planned bench/results/peaks-h100.json --device h100

Each cell is planned as ``ciuic plan`` does it, in a fresh process: on fake tensors, no code generated, for
the profile of the device that the file was measured on. Nothing needs a GPU and none is looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import common, peaks
from bench.models import MODELS, WithLoss
from ciuic_compile import planning

CPU = torch.device("cpu")


def cell(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Plan one cell; its predictions, with the CPU seconds that they took."""
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS[spec["model"]](spec["size"], spec["batch"], spec["length"])
    options = {"mode": spec["config"], "budget": spec["budget"]}
    start = time.process_time()
    (plan,) = planning.plan(
        WithLoss(built, loss_fn),
        batches(0, CPU),
        options={name: value for name, value in options.items() if value is not None},
        device=spec["profile"],
        autocast="bfloat16" if spec["precision"] == "autocast" else None,
    )
    fields = [field for field, _ in peaks.PREDICTORS.values()]
    return {
        "predicted": {field: getattr(plan, field) for field in fields},
        "plan_s": round(time.process_time() - start, 1),
    }


def main() -> None:
    """Plan every measured cell, print the tables, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measured", nargs="?", help="a file of bench.peaks")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="h100", help="profile to plan for")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    peaks.add_limits(parser, 300.0)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(json.loads(args.cell))))
        return
    if args.measured is None:
        parser.error("name a file of bench.peaks, such as bench/results/peaks-h100.json")
    end = time.monotonic() + args.limit
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found = json.loads(Path(args.measured).read_text())
    measured = [r for r in found["results"] if "failed" not in r]
    specs = [
        {**{k: r[k] for k in (*peaks.SPEC, "budget", "fraction", "measured")}, "profile": args.device}
        for r in measured
        if r["config"] != "inductor"
    ]
    planned = common.run_cells("bench.peaks_planned", specs, args.timeout, args.jobs, peaks.label, end)
    results = [{**r, "predicted": {}} for r in measured if r["config"] == "inductor"] + planned
    report = {
        "environment": common.environment(CPU),
        "command": shlex.join(["python", "-m", "bench.peaks_planned", *sys.argv[1:]]),
        "measured_in": found["environment"],
        "summary": peaks.print_tables(results),
        "results": results,
    }
    common.write_json(args.out, report)
    sys.exit(0 if planned and not any("failed" in r for r in planned) else 1)


if __name__ == "__main__":
    main()
