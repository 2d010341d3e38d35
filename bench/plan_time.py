"""How long planning takes: synthetic transformers of growing depth, under several budgets.

``PYTHONPATH=. python bench/plan_time.py [--layers 12 48 250] [--deadline 10]``. Ten storages a layer, sized
like a Llama's (hidden 4096, 8,192 tokens, bf16), with made-up but plausible times; the gradients of the
parameters pile up in ``base``. ``--graphs 12 48`` takes real joint graphs (GPT-2's form, d 64) and times
all that happens to them until they are rewritten, beside torch's own partitioner: the CPU time beyond that
is ours, and the same for each layer where planning is linear in them. ``--cold 48`` compiles them with empty
caches, once with Inductor and once with each plan, for the share of planning in that.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
from torch._inductor import compile_fx

from bench.language import GPT, TransformerConfig
from bench.models import WithLoss
from ciuic_compile import plans
from ciuic_compile.errors import InfeasibleBudgetError
from ciuic_compile.partitioner import CiuicPartitioner
from ciuic_compile.planner.program import (
    ABSENT,
    Candidate,
    Decision,
    Problem,
    Rebuild,
    Store,
    evaluate,
)
from ciuic_compile.planner.solve import Infeasible, Solution, solve
from ciuic_compile.types import Plan

MIB = 2**20

#: Name, MiB, inputs by name ("-x": of the layer before), microseconds to rebuild (None: not), fused,
#: lossy codecs allowed, step that reads it in the layer's backward (several: tuple).
LAYER = (
    ("x", 64.0, ("-down", "-x2"), 60.0, False, True, (11,)),
    ("rstd", 0.03, (), None, False, False, (11,)),
    ("norm", 64.0, ("x", "rstd"), 40.0, True, True, (10,)),
    ("qkv", 96.0, ("norm",), 900.0, False, True, (8, 9)),
    ("att", 64.0, ("qkv",), 700.0, False, True, (7, 8)),
    ("lse", 1.0, (), None, False, False, (8,)),
    ("x2", 64.0, ("x", "att"), 450.0, False, True, (6,)),
    ("norm2", 64.0, ("x2",), 40.0, True, True, (5,)),
    ("gateup", 344.0, ("norm2",), 3000.0, False, True, (3, 4)),
    ("down", 172.0, ("gateup",), 120.0, True, True, (2,)),
)
FORWARD, BACKWARD = 10, 12


def layered(layers: int, grads: float = 0.25, noise: float = 0.0) -> Problem:
    """A transformer of identical layers.

    Args:
        grads: parameter gradients of a layer over its activations' bytes; they pile up in the backward.
        noise: relative differences between the layers' variances, as an error model would give.
    """
    index: dict[tuple[int, str], int] = {}
    candidates: list[Candidate] = []
    steps = (FORWARD + BACKWARD) * layers
    for layer in range(layers):
        start, back = FORWARD * layer, steps - BACKWARD * (layer + 1)
        for position, (name, mib, inputs, rebuild_us, fused, lossy, reads) in enumerate(LAYER):
            size = int(mib * MIB)
            wanted = [(layer - 1, i[1:]) if i[0] == "-" else (layer, i) for i in inputs]
            sources = tuple(sorted(index[w] for w in wanted if w in index))
            factor = 1 + noise * ((layer * 37 + position * 11) % 17 - 8) / 8
            stores = [Store(size)]
            if lossy:
                us = size / 3.0e6  # bytes a microsecond: 3 TB/s
                for codec, bytes_left, moved, error in (
                    ("int8", 0.516, 2.5, 3e-5),
                    ("int6", 0.391, 2.3, 6e-4),
                    ("int5", 0.328, 2.2, 2.5e-3),
                    ("int4", 0.281, 2.1, 8e-3),
                ):
                    variance = error * factor / layers
                    stores.append(Store(int(size * bytes_left), us * moved, variance, codec, unpacked=True))
            index[layer, name] = len(candidates)
            candidates.append(
                Candidate(
                    f"{name}.{layer}",
                    size,
                    start + position,
                    min(start + position + 2, FORWARD * layers - 1),
                    tuple(back + r for r in reads),
                    tuple(stores),
                    Rebuild(rebuild_us, sources) if rebuild_us is not None else None,
                    fused,
                    group=name if layer else None,
                )
            )
    per_layer = int(sum(mib for _, mib, *_ in LAYER) * MIB * grads)
    base = [0] * (FORWARD * layers)
    for step in range(BACKWARD * layers):
        base.append(per_layer * (step + 1) // BACKWARD + 100 * MIB + (step % 5) * 20 * MIB)
    return Problem(FORWARD * layers, tuple(base), tuple(candidates))


def budgets(problem: Problem, shares: tuple[float, ...]) -> list[int]:
    """Budgets between the peak with everything at INT4 (0.0) and with everything kept (1.0)."""
    kept: Decision = tuple(0 for _ in problem.candidates)
    small: Decision = tuple(len(c.stores) - 1 if c.stores else ABSENT for c in problem.candidates)
    low, high = (evaluate(problem, d).peak_bytes for d in (small, kept))
    return [int(low + share * (high - low)) for share in shares]


def _gib(found: Infeasible) -> str:
    smallest = "?" if found.smallest is None else f"{found.smallest / 2**30:.2f}"
    return f"{found.bound / 2**30:.2f} to {smallest} GiB"


class _Done(Exception):
    """Raised once the graphs are partitioned: nothing is lowered."""


def deep(layers: int) -> tuple[WithLoss, torch.Tensor]:
    """GPT-2's form with d 64, and 8 x 512 tokens that are inputs and targets."""
    torch.manual_seed(0)
    model = WithLoss(GPT(TransformerConfig(layers, 64, 4, 4, 256, 256, 512, 8)))
    return model, torch.zeros(8, 512, dtype=torch.int64)


def partitioned(layers: int, options: dict[str, Any] | None) -> tuple[float, Plan | None, str]:
    """CPU seconds of partitioning (None: torch's own), the plan, and why there is none."""

    model, ids = deep(layers)
    seconds, plans, why = [], list[Plan | None](), ""
    ours = options is not None
    place, name = (
        (CiuicPartitioner, "__call__") if ours else (compile_fx, "min_cut_rematerialization_partition")
    )
    real = getattr(place, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            real(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)
        plans.append(args[0].plan if ours else None)
        raise _Done

    run = torch.compile(model, backend="ciuic" if ours else "inductor", options=options)
    with mock.patch.object(place, name, timed), inductor_config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        try:
            run(ids, ids)
        except InfeasibleBudgetError as error:
            why = str(error).splitlines()[0]
        except torch._dynamo.exc.BackendCompilerFailed:
            pass
    return seconds[-1], plans[-1] if plans else None, why


def graphs(layers: Sequence[int]) -> None:
    """Print what planning real joint graphs takes, in all and for each layer beyond torch's own."""
    print("| layers | plan | CPU seconds | beyond torch's | ms a layer beyond | peak MiB | gap |")
    print("|---|---|---|---|---|---|---|")
    partitioned(min(layers), {"mode": "lossless", "report": "off"})  # imports and torch's first calls
    for count in layers:
        own = partitioned(count, None)[0]
        print(f"| {count} | torch's own | {own:.1f} | | | | |", flush=True)
        free = 0
        for mode, share in (("lossless", None), ("lossless", 0.5), ("4:1", None), ("4:1", 0.75)):
            budget: dict[str, int] = {} if share is None else {"budget": int(share * free)}
            seconds, plan, why = partitioned(count, {"mode": mode, "report": "off", **budget})
            beyond = seconds - own
            times = f"{seconds:.1f} | {beyond:.1f} | {1e3 * beyond / count:.0f}"
            if plan is None:
                print(f"| {count} | {mode} {share} | {times} | {why} | |", flush=True)
                continue
            free = plan.planned_peak_bytes
            what = mode if share is None else f"{mode}, {share} of that peak"
            gap = f"{plan.gap:.2%}" if plan.tightened else ""
            print(f"| {count} | {what} | {times} | {free / MIB:.0f} | {gap} |", flush=True)


def cold(layers: int, options: dict[str, Any] | None) -> dict[str, float]:
    """CPU seconds of a first step with empty caches, children included, and of partitioning."""
    model, ids = deep(layers)
    planning, real = [], CiuicPartitioner.__call__

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return real(*args, **kwargs)
        finally:
            planning.append(time.process_time() - start)

    run = torch.compile(model, backend="inductor" if options is None else "ciuic", options=options)
    before = sum(os.times()[:4])
    with mock.patch.object(CiuicPartitioner, "__call__", timed):
        run(ids, ids).backward()
    plan = plans()[-1] if planning else None
    return {
        "seconds": sum(os.times()[:4]) - before,
        "planning": sum(planning),
        "rounds": len(planning),
        "peak": plan.planned_peak_bytes if plan else 0,
    }


def colds(layers: Sequence[int]) -> None:
    """Print what compiling takes with empty caches, each in a process of its own."""
    print("| layers | plan | CPU seconds to compile | plans made | CPU seconds for them | share |")
    print("|---|---|---|---|---|---|")
    for count in layers:
        own, _, _ = partitioned(count, None)
        free = 0
        for mode, share in ((None, None), ("lossless", None), ("lossless", 0.75), ("4:1", None)):
            budget: dict[str, int] = {} if share is None else {"budget": int(share * free)}
            options = None if mode is None else {"mode": mode, "report": "off", **budget}
            with tempfile.TemporaryDirectory() as caches:
                command = [sys.executable, __file__, "--cell", json.dumps([count, options])]
                places = {"TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": caches}
                said = subprocess.run(
                    command, env={**os.environ, **places}, check=True, stdout=subprocess.PIPE, text=True
                )
            found = json.loads(said.stdout.splitlines()[-1])
            free = found["peak"]
            ours = found["planning"] - found["rounds"] * own
            what = f"{mode or 'Inductor'}" + ("" if share is None else f", {share} of that peak")
            last = f"{found['rounds']} | {ours:.1f} | {ours / found['seconds']:.1%}" if mode else "- | - | -"
            print(f"| {count} | {what} | {found['seconds']:.0f} | {last} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 48, 96, 250])
    parser.add_argument("--deadline", type=float, default=10.0)
    parser.add_argument("--gap", type=float, default=0.005)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.3, 0.6, 0.9])
    parser.add_argument("--grads", type=float, nargs="+", default=[0.0, 0.25, 0.8])
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--graphs", type=int, nargs="+", help="real graphs of so many layers instead")
    parser.add_argument("--cold", type=int, nargs="+", help="compile real graphs of so many layers instead")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cold(*json.loads(options.cell))))
        return
    if options.cold:
        colds(options.cold)
        return
    if options.graphs:
        graphs(options.graphs)
        return
    print("| layers | candidates | grads | budget share | seconds | rounds | gap | cost ms |")
    print("|---|---|---|---|---|---|---|---|")
    for layers in options.layers:
        for grads in options.grads:
            problem = replace(layered(layers, grads, options.noise), variance_weight=1e6)
            for share, budget in zip(options.shares, budgets(problem, tuple(options.shares)), strict=True):
                start = time.perf_counter()
                found = solve(replace(problem, budget=budget), options.deadline, options.gap)
                seconds = time.perf_counter() - start
                what = (
                    f"{found.gap:.4%} | {found.evaluation.cost / 1e3:.2f}"
                    if isinstance(found, Solution)
                    else f"{'infeasible' if found.proved else 'none found'}: {_gib(found)} |"
                )
                print(
                    f"| {layers} | {len(problem.candidates)} | {grads} | {share} | {seconds:.2f} "
                    f"| {found.rounds} | {what} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
