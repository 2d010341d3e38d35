"""Random planning problems, and every decision of a small one at once: the judge of the planner's tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from math import fsum

import numpy as np
from numpy.typing import NDArray

from ciuic_compile.planner.program import ABSENT, Candidate, Problem, Rebuild, Store


def random_problem(rng: random.Random, largest: int = 7, chains: bool = False) -> Problem:
    """A small problem without limits: chains, shared inputs, fused values, values nothing reads.

    Args:
        chains: mostly rebuilds of rebuilds, so that few lifetimes are certain.
    """
    forward, backward = rng.randint(1, 5), rng.randint(2, 9)
    scale = rng.choice([1, 10, 10**6, 10**11])
    cost = rng.choice([1e-2, 1.0, 1e6])
    count = rng.randint(1, largest)
    candidates: list[Candidate] = []
    for i in range(count):
        produced = rng.randrange(forward)
        size = rng.randint(1, 20) * scale + rng.choice([0, 0, rng.randint(0, scale)])
        reads = rng.sample(
            range(backward), min(backward, rng.choice([0, 0, 1] if chains else [0, 1, 1, 1, 2, 3]))
        )
        stores = [Store(size)] if rng.random() < 0.9 else []
        for name in ("int8", "int4")[: rng.choice([0, 0, 1, 1, 2] if count < 7 else [0, 0, 0, 1])]:
            nbytes = rng.choice([size // 2, size // 4, rng.randint(0, size)])
            time_us = rng.choice([0.0, rng.uniform(0, 10)]) * cost
            stores.append(Store(nbytes, time_us, rng.choice([1e-4, rng.random()]), name, rng.random() < 0.6))
        rebuild = None
        if rng.random() < (0.85 if chains else 0.5):
            inputs = rng.sample(range(i), min(i, rng.choice([1, 2] if chains else [0, 1, 1, 2])))
            rebuild = Rebuild(rng.choice([0.0, rng.uniform(0, 10)]) * cost, tuple(sorted(inputs)))
        if not stores and rebuild is None:
            stores.append(Store(size))
        candidates.append(
            Candidate(
                f"v{i}",
                size,
                produced,
                rng.randint(produced, forward - 1),
                tuple(sorted(forward + r for r in reads)),
                tuple(stores),
                rebuild,
                fused=rebuild is not None and rng.random() < 0.3,
            )
        )
    # Without a lift the forward, where nothing is undecided, would nearly always be the tight place.
    lift = rng.choice([0, 1, 1, 1]) * 2 * sum(c.size for c in candidates)
    base = tuple(
        rng.choice([0, 0, rng.randint(0, 10) * scale]) + (lift if t >= forward else 0)
        for t in range(forward + backward)
    )
    return Problem(forward, base, tuple(candidates), fixed_saved=rng.choice([0, scale]))


@dataclass(frozen=True)
class Every:
    """All decisions of a problem in which nothing is missing, and what each does."""

    decisions: NDArray[np.int64]
    time_us: NDArray[np.float64]
    variance: NDArray[np.float64]
    saved: NDArray[np.int64]
    peak: NDArray[np.int64]

    def allowed(self, problem: Problem) -> NDArray[np.bool_]:
        """Which of them keep the limits."""
        ok = np.ones(len(self.peak), dtype=bool)
        if problem.budget is not None:
            ok &= self.peak <= problem.budget
        if problem.max_saved is not None:
            ok &= self.saved <= problem.max_saved
        if problem.max_variance is not None:
            ok &= self.variance <= problem.max_variance
        return ok


def every(problem: Problem) -> Every:
    """Enumerate; written apart from the simulator, over all decisions at once."""
    cs, steps = problem.candidates, problem.steps
    choices = [[*range(len(c.stores)), *([ABSENT] if c.rebuild or not c.reads else [])] for c in cs]
    decisions = np.array(list(product(*choices)), dtype=np.int64).reshape(-1, len(cs))
    total = len(decisions)
    first, last = np.empty((total, len(cs)), dtype=int), np.empty((total, len(cs)), dtype=int)
    for v, c in enumerate(cs):
        first[:, v], last[:, v] = min(c.reads, default=steps), max(c.reads, default=-1)
    missing = np.zeros(total, dtype=bool)
    for v in reversed(range(len(cs))):
        c = cs[v]
        absent = (decisions[:, v] == ABSENT) & (last[:, v] >= 0)
        if c.rebuild is None:
            missing |= absent
            continue
        for u in c.rebuild.inputs:
            first[absent, u] = np.minimum(first[absent, u], first[absent, v])
            until = last if c.fused else first
            last[absent, u] = np.maximum(last[absent, u], until[absent, v])
    time = np.arange(steps)
    live = np.tile(np.asarray(problem.base, dtype=np.int64), (total, 1))
    times, variances = np.zeros((total, len(cs))), np.zeros((total, len(cs)))
    saved = np.full(total, problem.fixed_saved, dtype=np.int64)
    for v, c in enumerate(cs):
        begin, end, needed = first[:, v, None], last[:, v, None], last[:, v] >= 0
        in_forward = (c.produced <= time) & (time <= c.last_use)
        between = (begin <= time) & (time <= end)
        for choice in choices[v]:
            here = decisions[:, v] == choice
            if choice == ABSENT:
                if not c.fused:
                    live += c.size * (here[:, None] & in_forward)
                    live += c.size * (here[:, None] & between)
                if c.rebuild is not None:
                    times[here & needed, v] = c.rebuild.time_us
                continue
            store = c.stores[choice]
            times[here, v], variances[here, v] = store.time_us, store.variance
            saved[here] += store.nbytes
            live += c.size * (here[:, None] & in_forward)
            after = (time > c.last_use) if store.codec is None else (time >= c.last_use)
            until = np.where((begin <= end) & store.unpacked, begin, end)
            until = np.maximum(until, problem.forward_steps - 1)
            live += store.nbytes * (here[:, None] & after & (time <= until))
            if store.unpacked:
                live += c.size * (here[:, None] & between)
    keep = ~missing
    return Every(
        decisions[keep],
        np.array([fsum(row) for row in times[keep]]),
        np.array([fsum(row) for row in variances[keep]]),
        saved[keep],
        live[keep].max(axis=1),
    )
