"""Predicted peak memory against the measured one: every model in several shapes and modes, and in budgets.

Each cell runs in a fresh process: the plan is written to a file before the compiled code first runs (the
cell notes both times, and what the file said at that moment), two steps warm up, then one is measured. It
starts with no gradients, so the new gradients count; parameters, buffers and inputs do not. Inductor's own
cells are held against the ``baseline`` of the plan for the same shape. Files of several calls become one:
``--join FILE FILE ... --out FILE``.

On a GPU, ``allocated`` is what tensors take, ``requested`` the same before rounding, ``reserved_total`` all
that the caching allocator holds after two steps: parameters, inputs and cuBLAS's workspaces included, as in
the plan. Before them its cache is emptied and cuBLAS's workspaces are given back: while kernels are being
tuned, those may be given larger blocks than they need.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch

import ciuic_compile
from bench import common, measure
from bench.models import MODELS, WithLoss
from ciuic_compile.backend import ciuic

MODES = ("lossless", "2:1", "4:1", "6:1")
WARM_UP = 2  # the backward is compiled in the first step, and its libraries allocate workspaces there
PREDICTORS = {  # name: the plan's field, what it is about
    "planned": ("planned_peak_bytes", "allocated"),  # Inductor's own allocations, replayed
    "simulated": ("simulated_peak_bytes", "allocated"),  # before Inductor has scheduled anything
    "reserved": ("reserved_bytes", "reserved_total"),
    "baseline": ("baseline_peak_bytes", "allocated"),  # of Inductor's cells
}
#: (batch, sequence or image side): peaks of hundreds of MiB at size "medium"
GPU_SHAPES: dict[str, list[tuple[int, int]]] = {
    "resnet50": [(64, 224), (32, 160)],
    "unet": [(64, 64), (32, 96)],
    "encdec": [(16, 512), (8, 256)],
    "moe": [(8, 1024), (4, 512)],
    "vit": [(64, 224), (32, 160)],
    "llama": [(8, 1024), (2, 2048), (16, 256)],
    "gpt": [(8, 1024), (4, 512), (2, 2048)],
}
CPU_SHAPES: dict[str, list[tuple[int, int]]] = {  # the same, for size "tiny": activations above parameters
    "gpt": [(16, 128)],
    "llama": [(16, 128)],
    "vit": [(64, 64)],
    "resnet50": [(16, 64)],
    "unet": [(16, 32)],
    "moe": [(16, 128)],
    "encdec": [(16, 64)],
}
CPU_MODELS = ("gpt", "llama", "vit")
CPU_MODES = ("lossless", "4:1")
BUDGET = ("2:1", 0.8)  # the mode and fraction of the budget cells, one a model
SLOW = ("unet", "resnet50")  # compile three times as long as the others
Spec = dict[str, Any]

# ---------------------------------------------------------------- one cell, in its own process


class FirstRun:
    """A backend around ciuic that notes what the plan's file said when the compiled code was about to run."""

    def __init__(self, path: Path, options: Mapping[str, Any]) -> None:
        self.path, self.options = path, dict(options)
        self.noted: dict[str, Any] = {}

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        run = ciuic(gm, inputs, options={**self.options, "report": str(self.path)})

        def noting(*args: Any) -> Any:
            if not self.noted:
                self.noted = self._note()
            return run(*args)

        return noting

    def _note(self) -> dict[str, Any]:
        plan = json.loads(self.path.read_text())["plan"]
        fields = [field for field, _ in PREDICTORS.values()]
        return {
            "plan_written_ns": self.path.stat().st_mtime_ns,
            "first_run_ns": time.time_ns(),
            "in_file": {field: plan[field] for field in fields if plan.get(field) is not None},
        }


@contextmanager
def empty_kernels() -> Iterator[None]:
    """Inductor's CPU kernels do nothing: what is allocated is up to the code around them, and g++ is not run.

    Only for memory: all that they would write is zero (valid as an index), the result means nothing.
    """

    def nothing(*args: Any, **kwargs: Any) -> Callable[..., None]:
        return lambda *pointers: None

    def zeros(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype).zero_()

    with (
        mock.patch("torch._inductor.async_compile.AsyncCompile.cpp_pybinding", nothing),
        mock.patch("torch._C._dynamo.guards._empty_strided_cpu", zeros),
    ):
        yield


def cell(spec: Spec) -> dict[str, Any]:
    """Compile one model in one configuration, note its predictions, measure one step."""
    with empty_kernels() if spec["empty_kernels"] else nullcontext():
        return _cell(spec)


def _cell(spec: Spec) -> dict[str, Any]:
    device = torch.device(spec["device"])
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS[spec["model"]](spec["size"], spec["batch"], spec["length"])
    model = WithLoss(built, loss_fn).to(device)
    inputs, targets = batches(0, device)
    options: dict[str, Any] = {"mode": spec["config"]}
    if spec["size"] == "tiny":
        options["min_bytes"] = 256
    if spec["budget"] is not None:
        options["budget"] = spec["budget"]
    with tempfile.TemporaryDirectory() as folder:
        backend = FirstRun(Path(folder, "plan.json"), options)
        ours = spec["config"] != "inductor"
        run = torch.compile(model, backend=backend if ours else "inductor", fullgraph=True)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with common.autocast(spec["precision"], device):
                loss: torch.Tensor = run(inputs, targets)
            loss.backward()

        start = time.perf_counter()
        for _ in range(WARM_UP):
            step()
        seconds = time.perf_counter() - start
        measured = measured_step(step, model, device)
    result = {"measured": measured, "compile_s": round(seconds, 1), "predicted": {}, **backend.noted}
    if ours:
        (plan,) = ciuic_compile.plans()
        fields = [field for field, _ in PREDICTORS.values()]
        result["predicted"] = {field: getattr(plan, field) for field in fields}
        result["input_bytes"], result["replayed"] = plan.input_bytes, plan.replayed
        result["saved"] = [plan.planned_saved_bytes, plan.baseline_saved_bytes]
    return result


def measured_step(step: Callable[[], None], model: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    """Peaks of one step above what is there at its start, and all that is reserved after it, in bytes.

    It is the second step from an emptied cache, as in the replay: it may find the blocks that the first one
    left too small.
    """
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type != "cuda":
        with measure.peak(device) as peak:
            step()
        return {"allocated": peak.nbytes, "reserved_total": None, "requested": None}
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()  # otherwise what the step reserves is there already
    start = torch.cuda.memory_reserved(device)
    step()
    model.zero_grad(set_to_none=True)
    requested = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    with measure.peak(device) as peak:
        step()
    return {
        "allocated": peak.nbytes,
        "requested": torch.cuda.memory_stats(device)["requested_bytes.all.peak"] - requested,
        "reserved_start": start,
        "reserved_total": torch.cuda.max_memory_reserved(device),
    }


# ---------------------------------------------------------------- which cells


def shape_cells(args: argparse.Namespace, device: torch.device) -> list[Spec]:
    """Cells without a budget: the models take turns, so that a run that is cut short has some of each."""
    gpu = device.type == "cuda"
    size = args.size or ("medium" if gpu else "tiny")
    models = args.models or (list(GPU_SHAPES) if gpu else list(CPU_MODELS))
    configs = ["inductor", *(args.modes or (MODES if gpu else CPU_MODES))]
    known = {"medium": GPU_SHAPES, "tiny": CPU_SHAPES}.get(size, {})
    shapes = {m: known.get(m, [(None, None)]) for m in models}
    shared = {
        "precision": args.precision or ("autocast" if gpu else "fp32"),
        "size": size,
        "device": str(device),
        "budget": None,
        "fraction": None,
        "empty_kernels": args.empty_kernels,
    }
    cells = [
        {"model": m, "config": config, "batch": shapes[m][i][0], "length": shapes[m][i][1], **shared}
        for i in range(max(map(len, shapes.values())))
        for config in configs
        for m in models
        if i < len(shapes[m])
    ]
    return cells[: args.cells]


def budget_bases(specs: Sequence[Spec], mode: str) -> list[Spec]:
    """The cells whose planned peak the budgets are a fraction of: each model's first shape in ``mode``."""
    bases: dict[str, Spec] = {}
    for spec in specs:
        if spec["config"] == mode:
            bases.setdefault(spec["model"], spec)
    return list(bases.values())


def budget_cells(results: Sequence[Mapping[str, Any]], fraction: float, mode: str) -> list[Spec]:
    """For the first shape of each model: the same again within a fraction of its own planned peak."""
    cells: dict[str, Spec] = {}
    for r in results:
        if r["config"] == mode and "failed" not in r and r["model"] not in cells:
            budget = int(fraction * r["predicted"]["planned_peak_bytes"])
            cells[r["model"]] = {**{k: r[k] for k in SPEC}, "budget": budget, "fraction": fraction}
    return list(cells.values())


SPEC = ("model", "config", "batch", "length", "precision", "size", "device", "empty_kernels")


def label(spec: Mapping[str, Any]) -> str:
    """A cell in a few words."""
    shape = f" {spec['batch']}x{spec['length']}" if spec["batch"] else ""
    budget = f" budget {spec['fraction']:g}" if spec["fraction"] else ""
    return f"{spec['model']} {spec['size']}{shape} {spec['precision']} {spec['config']}{budget}"


# ---------------------------------------------------------------- what they come to


def compare(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each cell: predictor -> (predicted, measured, error relative to measured), where there are both."""
    baselines = {_shape(r): r["predicted"]["baseline_peak_bytes"] for r in results if r.get("predicted")}
    rows = []
    for r in results:
        row: dict[str, Any] = {"cell": label(r)}
        for name, (field, what) in PREDICTORS.items() if "failed" not in r else ():
            if (name == "baseline") == (r["config"] == "inductor"):
                predicted = baselines.get(_shape(r)) if name == "baseline" else r["predicted"].get(field)
                measured = r["measured"].get(what)  # older files have fewer
                if predicted is not None and measured:
                    row[name] = (predicted, measured, predicted / measured - 1)
        rows.append(row)
    return rows


def _shape(r: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(r[k] for k in SPEC if k != "config")


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Per predictor: the number of cells, median and 95th percentile of |error|, the worst underestimate."""
    out = {}
    for name in PREDICTORS:
        errors = [row[name][2] for row in rows if name in row]
        if errors:
            sizes = sorted(map(abs, errors))
            out[name] = {
                "cells": len(errors),
                "median": statistics.median(sizes),
                "p95": sizes[math.ceil(0.95 * len(sizes)) - 1],
                "worst": sizes[-1],
                "worst_underestimate": min(0.0, *errors),
            }
    return out


def table_rows(results: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The printed table."""
    lines = []
    for r, row in zip(results, rows, strict=True):
        if "failed" in r:
            lines.append([row["cell"], "failed", *["-"] * 7])
            continue
        plan = row.get("planned") or row.get("baseline") or (None, r["measured"]["allocated"], None)
        simulated, reserved = row.get("simulated", (None,) * 3), row.get("reserved", (None,) * 3)
        lines.append(
            [
                row["cell"],
                *map(common.mib, plan[:2]),
                percent(plan[2]),
                common.mib(simulated[0]),
                percent(simulated[2]),
                common.mib(reserved[0]),
                common.mib(reserved[1]),
                percent(reserved[2]),
            ]
        )
    return lines


def last_error(said: str) -> str:
    """The last line that names an error (Dynamo adds advice after it), or the last of all."""
    lines = said.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), lines[-1])


def percent(error: float | None) -> str:
    """A relative error with its sign."""
    return "-" if error is None else f"{100 * error:+.2f}"


COLUMNS = ("cell", "planned", "measured", "err %", "simulated", "err %", "reserved", "measured", "err %")
SUMMARY = ("predictor", "cells", "median |err| %", "95th %", "worst %", "worst under %")


def print_tables(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The cells, those that failed, and the summary, which is returned."""
    rows = compare(results)
    total = summary(rows)
    common.table("peak above parameters and inputs, MiB", COLUMNS, table_rows(results, rows))
    for r in results:
        if "failed" in r:
            print(f"failed: {label(r)}: {last_error(r['failed'])}")
    late = [label(r) for r in results if r.get("first_run_ns", 1) <= r.get("plan_written_ns", 0)]
    for name in late:
        print(f"NOT WRITTEN BEFORE IT RAN: the plan of {name}")
    columns = ("median", "p95", "worst", "worst_underestimate")
    lines = [[n, str(s["cells"]), *(f"{100 * s[c]:.2f}" for c in columns)] for n, s in total.items()]
    common.table("predicted against measured", SUMMARY, lines)
    return total


def joined(files: Sequence[str]) -> dict[str, Any]:
    """One report of several, a cell that is in two of them from the later one; all of one environment."""
    reports = [json.loads(Path(file).read_text()) for file in files]
    here = reports[0]["environment"]
    for file, report in zip(files, reports, strict=True):
        for name, there in report["environment"].items():
            if there != here.get(name):
                sys.exit(f"cannot join: {name} is {here.get(name)!r} in {files[0]}, {there!r} in {file}")
    cells = {(*(r[k] for k in SPEC), r["fraction"]): r for report in reports for r in report["results"]}
    return {
        "environment": here,
        "command": " ; ".join(report["command"] for report in reports),
        "results": list(cells.values()),
    }


def add_limits(parser: argparse.ArgumentParser, timeout: float) -> None:
    """How long cells may take, and where their results go."""
    parser.add_argument("--timeout", type=float, default=timeout, help="seconds a cell may take")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for everything")
    parser.add_argument("--out", help="JSON file to write")


def finish(out: str | None, report: dict[str, Any]) -> NoReturn:
    """Print the tables, write the file, exit: with 1 where no cell has a result."""
    results = report.pop("results")
    common.write_json(out, {**report, "summary": print_tables(results), "results": results})
    sys.exit(0 if any("failed" not in r for r in results) else 1)


def main() -> None:
    """Run the cells asked for, print the tables, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: all on a GPU")
    parser.add_argument("--modes", nargs="+", help="beside Inductor itself; default: all on a GPU")
    parser.add_argument("--precision", choices=("fp32", "autocast"), help="default: autocast on a GPU")
    parser.add_argument(
        "--size", choices=("tiny", "small", "medium", "full"), help="default: medium on a GPU"
    )
    parser.add_argument("--cells", type=int, help="only so many, before those with a budget")
    parser.add_argument(
        "--budget", type=float, default=BUDGET[1], help="of the planned peak; 0: no such cells"
    )
    parser.add_argument("--budget-mode", default=BUDGET[0], help="the mode of the cells with a budget")
    parser.add_argument("--device")
    parser.add_argument(
        "--empty-kernels", action="store_true", help="on a CPU: Inductor's kernels do nothing (g++ is slow)"
    )
    parser.add_argument("--jobs", type=int, help="cells at a time; default: 8 on a GPU")
    parser.add_argument("--join", nargs="+", metavar="FILE", help="run nothing: make one of these files")
    add_limits(parser, 150.0)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(json.loads(args.cell))))
        return
    if args.join:
        finish(args.out, joined(args.join))
    end = time.monotonic() + args.limit
    device = common.pick_device(args.device)
    jobs = args.jobs or (8 if device.type == "cuda" else 1)
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    report: dict[str, Any] = {
        "environment": common.environment(device),
        "command": shlex.join(["python", "-m", "bench.peaks", *sys.argv[1:]]),
    }
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as caches:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches  # a warm cache would skip the planning

        def each(result: dict[str, Any]) -> None:
            results.append(result)
            common.write_json(args.out, {**report, "results": results})  # should we be stopped

        def follow(result: Mapping[str, Any]) -> list[Spec]:
            is_base = any(all(result[k] == v for k, v in spec.items()) for spec in bases)
            return budget_cells([result], args.budget, args.budget_mode) if is_base else []

        specs = shape_cells(args, device)
        bases = budget_bases(specs, args.budget_mode) if args.budget else []
        first = sorted(specs, key=lambda c: (c not in bases, c["model"] not in SLOW))  # else they end alone
        done = common.run_cells("bench.peaks", first, args.timeout, jobs, label, end, each, follow)
        shapes = [next(r for r in done if all(r[k] == v for k, v in spec.items())) for spec in specs]
        results[:] = [*shapes, *(r for r in done if r["budget"] is not None)]
    finish(args.out, {**report, "results": results})


if __name__ == "__main__":
    main()
