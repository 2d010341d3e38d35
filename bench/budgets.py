"""Budget sweep: our peak and step time beside those of torch's own activation_memory_budget, in one process.

    python -m bench.budgets --layers 4 --points 15 --warm 14 --plot docs/budgets-llama.png
    python -m bench.budgets --model gpt --points 15 --warm 14

A Llama-shaped model in bf16, or one of :mod:`bench.models` under autocast. torch's budgets are its own
fractions (0 to 1), ours are bytes: fractions of the peak that Inductor is measured to have, and each peak
that torch's own are measured to have, less 0.2%. Of torch's fractions that save the same, the first is
measured. Every configuration is compiled first (``--warm``: by several processes into one cache), then all
take turns in one process, four steps at a time.
Peaks are above the parameters, without gradients at the start; gradient errors are against Inductor.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import ciuic_compile
from bench import common, measure
from bench.kernel_times import by_kind, profiled
from bench.models import MODELS, WithLoss
from bench.plot import write_curves
from bench.step_time import SMALL, WithLossView, build, ratio, step_of, take_turns
from ciuic_compile.errors import InfeasibleBudgetError

COLUMNS = (
    "", "budget MiB", "planned", "peak", "over %", "step ms", "x", "busy ms", "host ms", "grad err", "gap %",
    "predicted us",
)  # fmt: skip


#: Ours are asked for so much of a peak of torch's, since what cuDNN takes is known to 0.1% of it.
_BELOW = 0.998


def made(spec: dict[str, Any]) -> tuple[WithLoss, torch.Tensor, torch.Tensor, torch.device]:
    """The model and its batch."""
    if spec["model"] == "llama-shape":
        return build(spec)
    device = torch.device(spec["device"])
    torch.manual_seed(0)
    built, batches, loss = MODELS[spec["model"]](
        "medium" if device.type == "cuda" else "tiny", batch=spec["batch"]
    )
    return WithLoss(built, loss).to(device), *batches(0, device), device


def sweep(spec: dict[str, Any], end: float) -> list[dict[str, Any]]:
    """Compile and measure every configuration until ``end`` (of ``time.monotonic``), then time them.

    With ``share``, (i, n), in ``spec``: every n-th of torch's, or where ``budgets`` are given of ours,
    compiled and not timed to warm the caches.
    """
    model, inputs, targets, device = made(spec)
    precision = "off" if spec["model"] == "llama-shape" else "autocast"
    asked, share = itertools.count(), spec["share"]
    same: dict[str, str] = {}  # of torch's, which saves what another does
    ready: dict[str, Any] | None = None  # what the caches hold, or would if there were such a plan
    steps: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    reference: dict[str, torch.Tensor] = {}
    smallest: dict[str, int] = {}  # by mode, where a budget was too small
    base, began = 0, time.monotonic()

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        if share is not None:  # for the process that this one compiles for
            print(json.dumps(row), flush=True)

    def impossible(name: str, budget: int | None, least: int) -> None:
        keep({"config": name, "budget": budget, "failed": f"smallest {common.mib(least)}"})

    def measured(name: str, backend: str, budget: int | None = None, **options: Any) -> None:
        nonlocal base, reference
        if share is not None and next(asked) % share[1] != share[0]:
            return
        if ready is not None and name != "inductor":
            found = ready.get(name, {"failed": "not compiled in time"})
            if "failed" in found:
                rows.append({**found, "config": name, "budget": budget})
                return
        if name in same:
            rows.append({"config": name, "same_as": same[name]})
            return
        if budget is not None and (least := smallest.get(repr(options), 0)) > budget:
            impossible(name, budget, least)
            return
        if share is None:
            print(f"{time.monotonic() - began:.0f} s: {name}", file=sys.stderr)
        if time.monotonic() > end:
            rows.append({"config": name, "failed": "not started: no time left"})
            return
        before, start = len(ciuic_compile.plans()), time.perf_counter()
        view, forwards = WithLossView(model), list[str]()
        if backend == "inductor":

            def compiled(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:  # each its own
                return compile_fx(gm, inputs, inner_compile=noting(forwards))

            run = torch.compile(view, backend=compiled)
        else:
            given = {"report": "off", **options, **({} if budget is None else {"budget": budget})}
            run = torch.compile(view, backend="ciuic", options=given)

        step = step_of(model, common.under_autocast(run, precision, device), inputs, targets)
        try:
            step()
        except InfeasibleBudgetError as error:
            smallest[repr(options)] = error.smallest_bytes
            impossible(name, budget, error.smallest_bytes)
            return
        seconds = time.perf_counter() - start
        step()
        model.zero_grad(set_to_none=True)
        with measure.peak(device) as peak:
            step()
        got = measure.gradients(model)
        reference = reference or got
        base = base or peak.nbytes
        row: dict[str, Any] = {
            "config": name,
            "budget": budget,
            "forwards": forwards,
            "peak": peak.nbytes,
            "compile_s": seconds,
            "error": measure.gradient_error(reference, got).whole,
        }
        if len(ciuic_compile.plans()) > before:
            plan = ciuic_compile.plans()[-1]
            row |= {"planned": plan.planned_peak_bytes, "gap": plan.gap, "time_us": plan.time_us}
            row |= {"simulated": plan.simulated_peak_bytes, "correction": plan.correction_bytes}
            row["late"] = any("deadline" in note for note in plan.notes)
            row |= {"planned_error": plan.gradient_error, "tightened": plan.tightened}
        keep(row)
        steps[name] = step

    budgets = spec["budgets"]
    if budgets is None:
        if share is None and spec["warm"]:
            warmed = warm(spec["warm"], time.monotonic() + 0.4 * (end - time.monotonic()))
            same, ready = alike(warmed), {row["config"]: row for row in warmed}
        measured("inductor", "inductor")
        shares = [1 - (i + 1) / (spec["points"] + 1) for i in range(spec["points"])]
        for fraction in (fractions := spec["fractions"] or shares):
            with functorch_config.patch(activation_memory_budget=fraction, enable_autograd_cache=False):
                measured(f"torch {fraction:.2f}", "inductor")
        if share is not None:
            return rows
        theirs = {row["peak"] for row in rows if row["config"] != "inductor" and "peak" in row}
        peaks = sorted(int(peak * _BELOW) for peak in theirs)
        evenly = sorted((int(f * base) for f in fractions), reverse=True)
        by_name = {common.mib(budget): budget for budget in (*evenly, *reversed(peaks))}  # the smaller of two
        budgets = sorted(by_name.values(), key=lambda budget: (budget not in peaks, -budget))
        if spec["warm"]:
            warmed = warm(spec["warm"], end - 0.1 * spec["limit"], budgets)
            ready = {row["config"]: row for row in warmed}
    for budget in budgets:
        for mode in spec["modes"]:
            name, *options = mode.split(",")
            given = {key: json.loads(value) for key, _, value in (o.partition("=") for o in options)}
            measured(f"{mode} {common.mib(budget)}", "ciuic", budget, mode=name, **given)
    if share is not None:
        return rows
    rows.sort(key=lambda row: -(row.get("budget") or float("inf")))
    print(f"{time.monotonic() - began:.0f} s: all in turns", file=sys.stderr)
    times = take_turns(steps, device, spec["steps"], burst=4)
    for row in rows:
        if row["config"] in times:
            row["step_ms"] = statistics.median(times[row["config"]])
            row["ratio"] = ratio(times["inductor"], times[row["config"]])
            if device.type == "cuda":
                kernels = profiled(steps[row["config"]], 3)
                row["busy_ms"] = sum(ms for ms, _ in kernels.values())
                row["busy_by_kind"] = by_kind(kernels)
                row |= {"kernels": kernels} if spec["kernels"] else {}
                row["host_ms"] = host_ms(steps[row["config"]], device)
    return rows


def noting(forwards: list[str]) -> Callable[..., Any]:
    """Inductor's compiler of one graph, with a digest of each forward: of what it computes and returns."""

    def compile_graph(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_backward"):
            forwards.append(hashlib.sha256(str(gm.graph).encode()).hexdigest()[:16])
        return compile_fx_inner(gm, *args, **kwargs)

    return compile_graph


def alike(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Each of torch's fractions that saves what a larger one does, and that one's name."""
    first: dict[tuple[str, ...], str] = {}
    same = dict[str, str]()
    for row in sorted((r for r in rows if r.get("forwards")), key=lambda r: r["config"], reverse=True):
        if row["config"].startswith("torch"):
            larger = first.setdefault(tuple(row["forwards"]), row["config"])
            same |= {row["config"]: larger} if larger != row["config"] else {}
    return same


def host_ms(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds until a step is launched: where a GPU is busy for less, it waits."""
    spent = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        spent.append(1e3 * (time.perf_counter() - start))
    return statistics.median(spent)


def plot(path: str, title: str, rows: list[dict[str, Any]]) -> None:
    """Step time over Inductor's by measured peak, one curve for torch's own budgets and each of our modes."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "ratio" in row and row["config"] != "inductor":
            name = row["config"].split()[0]
            curves.setdefault(name, []).append((row["peak"] / 2**20, row["ratio"]))
    write_curves(path, title, {name: sorted(points) for name, points in curves.items()}, axis="MiB")


def table_row(row: dict[str, Any]) -> list[str]:
    """One line of the printed table."""
    if "same_as" in row:
        return [row["config"], "-", f"as {row['same_as']}", *["-"] * 9]
    if "failed" in row:
        return [row["config"], common.mib(row.get("budget")), row["failed"], *["-"] * 9]
    budget = row["budget"]
    return [
        row["config"],
        common.mib(budget),
        common.mib(row.get("planned")),
        common.mib(row["peak"]),
        "-" if budget is None else f"{100 * (row['peak'] / budget - 1):+.2f}",
        f"{row['step_ms']:.2f}",
        f"{row['ratio']:.3f}",
        *(f"{row[key]:.2f}" if key in row else "-" for key in ("busy_ms", "host_ms")),
        common.share(row["error"]),
        f"{100 * row['gap']:.2f}" if row.get("tightened") else "-",
        f"{row['time_us']:.0f}" if "time_us" in row else "-",
    ]


class Match(NamedTuple):
    """One of torch's fractions, by its own name, the row of its figures, and the fastest of ours there."""

    config: str
    theirs: dict[str, Any]
    ours: dict[str, Any] | None

    @property
    def faster(self) -> bool:
        """Whether ours takes less time."""
        return self.ours is not None and self.ours["ratio"] < self.theirs["ratio"]


def timed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours that were measured."""
    return [r for r in rows if r.get("tightened") is not None and "ratio" in r]


def matches(rows: list[dict[str, Any]]) -> list[Match]:
    """For each of torch's fractions that was measured, the fastest of ours that peaks no higher."""
    by_name = {r["config"]: r for r in rows}
    found = []
    for r in rows:
        theirs = by_name.get(r.get("same_as", ""), r)
        if r["config"].startswith("torch") and "ratio" in theirs:
            fits = (o for o in timed(rows) if o["peak"] <= theirs["peak"])
            found.append(Match(r["config"], theirs, min(fits, key=lambda o: o["ratio"], default=None)))
    return found


def over(rows: list[dict[str, Any]]) -> float:
    """The most by which one of ours exceeds its budget."""
    return max(float(o["peak"] / o["budget"] - 1) for o in rows)


def rises(rows: list[dict[str, Any]]) -> int:
    """Neighbours of ours of which the one with less budget has the larger peak."""
    return sum(a["peak"] < b["peak"] for a, b in itertools.pairwise(rows))


def against(rows: list[dict[str, Any]]) -> list[str]:
    """What :func:`matches` finds, and how our modes keep to their budgets, in lines."""
    found, ours = matches(rows), timed(rows)
    points = [f"{_point(m.theirs)} -> {'none' if m.ours is None else _point(m.ours)}" for m in found]
    lines = list(dict.fromkeys(points))
    wins = sum(m.faster for m in found)
    lines.append(
        f"ours faster at no higher peak: {wins} of {len(found)} fractions, which save {len(lines)} ways"
    )
    for mode in dict.fromkeys(o["config"].split()[0] for o in ours):
        rows = [o for o in ours if o["config"].split()[0] == mode]
        lines.append(
            f"{mode}: the peak falls with the budget: {not rises(rows)}; at most {over(rows):+.2%} over it"
        )
    return lines


def _point(row: dict[str, Any]) -> str:
    return f"{row['config']}: x {row['ratio']:.3f}, {common.mib(row['peak'])} MiB"


def warm(processes: int, end: float, budgets: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Compile torch's configurations, or with ``budgets`` ours, in processes whose caches are this one's.

    Args:
        end: of ``time.monotonic``; what runs then is stopped.

    Returns:
        The rows of what was compiled.
    """
    command = [sys.executable, "-m", "bench.budgets", *sys.argv[1:]]
    command += ["--budgets", *map(str, budgets)] if budgets else []
    with tempfile.TemporaryFile("w+") as said:  # no pipe: compile workers of what is stopped would hold it
        running = [
            subprocess.Popen([*command, "--share", str(i), str(processes)], stdout=said)
            for i in range(processes)
        ]
        for each in running:
            try:
                each.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.kill()
        said.seek(0)
        return [json.loads(line) for line in said if line.endswith("}\n")]


def main() -> None:
    """Sweep and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-shape", choices=("llama-shape", *MODELS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--ff", type=int, default=5504)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, help="samples; a step that is short waits for the host")
    parser.add_argument("--small", action="store_true", help="a toy shape, to try the script on a CPU")
    parser.add_argument("--points", type=int, default=15, help="budgets of each kind, evenly below 1")
    parser.add_argument("--fractions", type=float, nargs="+", help="these budgets instead")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=["lossless", "1:1"],
        help="ours, each with every budget; more options of one after commas: lossless,plan_seconds=60",
    )
    parser.add_argument("--steps", type=int, default=10, help="rounds of four timed steps of each")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which nothing is compiled")
    parser.add_argument("--warm", type=int, default=0, help="processes that compile first")
    parser.add_argument("--kernels", action="store_true", help="write every kernel's time down, too")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--budgets", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--plot", help="PNG to write: step time over peak")
    parser.add_argument("--device")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    torch._dynamo.config.recompile_limit = 10_000
    shape = (
        SMALL if args.small else {**{name: getattr(args, name) for name in SMALL}, "batch": args.batch or 8}
    )
    dtype = "bf16" if device.type == "cuda" else "fp32"
    spec = {"shape": shape, "device": str(device), "dtype": dtype, "steps": args.steps}
    spec |= {"points": args.points, "modes": args.modes, "model": args.model, "batch": args.batch}
    spec |= {"kernels": args.kernels, "limit": args.limit}
    spec |= {"fractions": args.fractions, "warm": args.warm, "share": args.share, "budgets": args.budgets}
    rows = sweep(spec, time.monotonic() + args.limit)
    if args.share:
        return
    common.table(
        "peaks above parameters, MiB; x = step time over Inductor's", COLUMNS, [table_row(r) for r in rows]
    )
    print(*against(rows), sep="\n")
    if args.plot:
        plot(args.plot, f"{args.model}: step time over Inductor's, by peak MiB", rows)
    command = shlex.join(["python", "-m", "bench.budgets", *sys.argv[1:]])
    found = {"environment": common.environment(device), "command": command, "spec": spec, "rows": rows}
    common.write_json(args.out, json.loads(json.dumps(found)))


if __name__ == "__main__":
    main()
