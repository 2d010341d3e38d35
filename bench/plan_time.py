"""How long planning takes: synthetic transformers of growing depth, under several budgets.

``PYTHONPATH=. python bench/plan_time.py [--layers 12 48 250] [--deadline 10]``. Ten storages a layer, sized
like a Llama's (hidden 4096, 8,192 tokens, bf16), with made-up but plausible times; the gradients of the
parameters pile up in ``base``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 48, 96, 250])
    parser.add_argument("--deadline", type=float, default=10.0)
    parser.add_argument("--gap", type=float, default=0.005)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.3, 0.6, 0.9])
    parser.add_argument("--grads", type=float, nargs="+", default=[0.0, 0.25, 0.8])
    parser.add_argument("--noise", type=float, default=0.0)
    options = parser.parse_args()
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
