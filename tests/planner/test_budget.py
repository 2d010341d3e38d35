"""Budgets: keep, rebuild and codec chosen together. Plans hold, and what is lossless is exact."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench.language import GPT, TransformerConfig
from ciuic_compile import Plan, backend
from ciuic_compile.errors import InfeasibleBudgetError
from ciuic_compile.planner.assign import Option
from ciuic_compile.planner.descent import Effort, descend
from ciuic_compile.planner.formulate import Formulation, formulate, storable
from ciuic_compile.planner.highs import _without_lines
from ciuic_compile.planner.program import ABSENT, Decision, evaluate
from ciuic_compile.planner.state import State
from ciuic_compile.simulate import tensor_bytes
from ciuic_compile.types import Action
from tests.planner.planning import random_problem
from tests.stages import Stage, stage
from tests.training import Step, errors, interpreted, step


class Deep(nn.Module):
    """A GPT of several equal layers and the sum of its logits' squares."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.gpt = GPT(TransformerConfig(layers, 64, 4, 4, 256, 29, 32, 8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.gpt(tokens)
        return logits.square().mean()


TOKENS = torch.randint(29, (8, 32), generator=torch.Generator().manual_seed(1))


def made(mode: str, budget: int | None) -> Step:
    """One step of :class:`Deep` in eager kernels, planned for that budget."""
    torch.manual_seed(0)
    with interpreted():
        return step(Deep(), [TOKENS], mode, options={} if budget is None else {"budget": budget})


@pytest.fixture(scope="module")
def free() -> Step:
    return made("lossless", None)


def only(got: Step) -> Plan:
    (plan,) = got.plans
    return plan


@pytest.mark.xdist_group("budget")
def test_a_lossless_budget_computes_matmuls_again_and_stays_exact(free: Step) -> None:
    times = []
    for share in (0.9, 0.7):
        budget = int(share * only(free).simulated_peak_bytes)
        held = made("lossless", budget)
        plan = only(held)
        assert plan.simulated_peak_bytes <= budget and plan.tightened
        assert plan.planned_saved_bytes == held.saved.nbytes
        assert plan.gradient_error == 0.0
        assert max(errors(free, held).values()) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(free.outputs, held.outputs, strict=True))
        times.append(plan.time_us)
    assert 0 < times[0] < times[1], "less memory costs more time"
    again = {d.storage.op for d in plan.decisions if d.action is Action.RECOMPUTE}
    assert "aten.addmm.default" in again
    assert all(d.codec is None for d in plan.decisions)


@pytest.mark.xdist_group("budget")
def test_a_lossy_budget_stays_within_the_stated_error(free: Step) -> None:
    budget = int(0.55 * only(free).simulated_peak_bytes)
    held = made("1:1", budget)
    plan = only(held)
    assert plan.simulated_peak_bytes <= budget
    assert held.saved.nbytes == plan.planned_saved_bytes
    assert 0 < max(errors(free, held).values()) <= plan.gradient_error_bound
    assert any(d.action is Action.COMPRESS for d in plan.decisions)


def test_a_loose_budget_is_met_in_inductors_own_time(free: Step) -> None:
    plan = only(free)
    loose = only(made("lossless", 2 * plan.baseline_peak_bytes))
    assert loose.time_us == 0.0 < plan.time_us
    assert loose.simulated_peak_bytes > plan.simulated_peak_bytes


def replayed(monkeypatch: pytest.MonkeyPatch, drift: Callable[[Plan, int], int]) -> list[Plan]:
    """Let Inductor's schedules need so many bytes more than plans say; the plans are listed as they come."""
    plans: list[Plan] = []

    def confirm(plan: Plan, *_: object) -> Plan:
        peak = plan.simulated_peak_bytes + drift(plan, len(plans) + 1)
        plans.append(replace(plan, planned_peak_bytes=peak, replayed=True))
        return plans[-1]

    monkeypatch.setattr(backend, "confirm", confirm)
    return plans


def test_a_schedule_that_needs_more_again_and_again_is_aimed_below(
    free: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = int(0.8 * only(free).baseline_peak_bytes)
    plans = replayed(monkeypatch, lambda plan, n: budget + 1 - plan.simulated_peak_bytes if n < 3 else 0)
    found = only(made("lossless", budget))
    assert [plan.planned_peak_bytes <= budget for plan in plans] == [False, False, True, True]
    drifts = [plan.planned_peak_bytes - plan.simulated_peak_bytes for plan in plans]
    first, second, third, nearer = [plan.correction_bytes for plan in plans]
    assert [first, second, third] == [0, drifts[0], drifts[1] + int(0.03 * budget)]
    assert nearer == (second + third) // 2, "the third left much of the budget"
    assert found == plans[-1] and found.tightened


def test_where_no_correction_helps_the_modes_own_plan_is_tried(
    free: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = int(1.02 * only(free).simulated_peak_bytes)
    plans = replayed(monkeypatch, lambda plan, number: budget if plan.tightened else 0)
    found = only(made("lossless", budget))
    assert [plan.tightened for plan in plans] == [True, False]
    assert found == plans[-1] and found.planned_peak_bytes <= budget


def test_where_every_schedule_is_over_the_smallest_plan_is_tried_last(
    free: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule may need what no plan accounts for, in all but plans of another kind."""
    with pytest.raises(InfeasibleBudgetError) as caught:
        made("lossless", 100_000)
    smallest = caught.value.smallest_bytes
    budget = int(1.5 * smallest)

    def drift(plan: Plan, _: int) -> int:
        peak = plan.simulated_peak_bytes
        return 0 if peak < 1.01 * smallest else budget + 1000 - peak

    plans = replayed(monkeypatch, drift)
    found = only(made("lossless", budget))
    assert found.planned_peak_bytes <= 1.01 * smallest
    assert 3 <= len(plans) <= 9 and len({plan.simulated_peak_bytes for plan in plans}) == len(plans)

    plans.clear()
    monkeypatch.undo()
    plans = replayed(monkeypatch, lambda plan, n: budget + n - plan.simulated_peak_bytes)
    with pytest.raises(InfeasibleBudgetError, match="the smallest plan found needs") as caught:
        made("lossless", budget)
    assert caught.value.smallest_bytes == budget + 1
    assert min(plan.simulated_peak_bytes for plan in plans) < 1.01 * smallest


def test_a_stored_correction_that_leaves_no_plan_is_forgotten(
    free: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a schedule once needed may leave no room, where another's would."""
    budget = int(0.9 * only(free).simulated_peak_bytes)
    held = only(made("lossless", budget))
    stored = replace(held, correction_bytes=budget, tightened=True)
    monkeypatch.setattr(backend.cache, "load", lambda key: stored)
    assert only(made("lossless", budget)).planned_peak_bytes <= budget


def test_an_impossible_budget_names_what_is_alive_at_the_smallest_peak() -> None:
    with pytest.raises(InfeasibleBudgetError) as caught:
        made("lossless", 100_000)
    said, smallest = str(caught.value), caught.value.smallest_bytes
    assert "alive at its peak" in said and "language.py:" in said
    assert only(made("lossless", smallest)).simulated_peak_bytes <= smallest


def formulated(found: Stage) -> Formulation:
    """The problem of a stage, where everything may only be kept."""
    model = found.model
    options = {n: [Option(None, tensor_bytes(n.meta["val"]), 0.0, 0.0)] for n in storable(model)}
    return formulate(model, options, found.selection.saved)


def test_the_problems_saved_bytes_and_nodes_are_those_of_the_decision() -> None:
    found = stage(Deep(2), TOKENS, mode="lossless")
    form = formulated(found)
    start = form.decision(found.selection.saved, {})
    result = evaluate(form.problem, start)
    assert not result.missing
    ours = found.model.storages_of(form.saved(start))
    assert set(form.stored(start)) <= set(ours)
    pinned = sum(size for n, size in ours.items() if n not in form.stored(start))
    assert result.saved_bytes == sum(ours.values()) - pinned
    assert form.decision(form.saved(start), {}) == start


def test_equal_layers_share_a_group() -> None:
    form = formulated(stage(Deep(3), TOKENS, mode="lossless"))
    groups: dict[str | None, int] = {}
    for c in form.problem.candidates:
        groups[c.group] = groups.get(c.group, 0) + 1
    assert max(groups.values()) >= 3
    assert len(groups) < 0.7 * len(form.problem.candidates)


def test_what_a_derivative_reads_anyway_is_not_read_again_for_a_rebuild() -> None:
    """GELU's derivative reads what GELU reads; the derivative of an addition reads nothing."""
    activations = {"gelu": nn.GELU(), "add": Added()}
    cost = {}
    for name, activation in activations.items():
        model = nn.Sequential(nn.Linear(64, 256), activation, nn.Linear(256, 64))
        found = stage(model, torch.randn(32, 64), mode="lossless")
        (again,) = (
            c.rebuild for c in formulated(found).problem.candidates
            if c.rebuild is not None and c.size == 32 * 256 * 4 and not c.name.startswith("addmm")
        )  # fmt: skip
        cost[name] = again.time_us * found.model.device.bytes_per_us / (32 * 256 * 4)
    assert cost == {"gelu": pytest.approx(1), "add": pytest.approx(2)}


def test_a_derivative_behind_what_reads_the_value_shares_no_kernel_with_its_rebuild() -> None:
    """A convolution's backward reads GELU's output and makes the gradient that GELU's derivative takes."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3))
    found = stage(model, torch.randn(2, 4, 12, 12), mode="lossless")
    size = 2 * 8 * 10 * 10 * 4
    (again,) = (
        c.rebuild for c in formulated(found).problem.candidates
        if c.rebuild is not None and c.size == size and not c.name.startswith("convolution")
    )  # fmt: skip
    assert again.time_us * found.model.device.bytes_per_us / size == pytest.approx(2)


class Added(nn.Module):
    """Adds a constant that no gradient asks for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1.5


def test_a_decision_changed_in_place_is_measured_as_a_new_one() -> None:
    rng = random.Random(1)
    for _ in range(60):
        problem = random_problem(rng, chains=True)
        problem = replace(problem, budget=rng.randrange(1, 2 * sum(c.size for c in problem.candidates)))
        count = len(problem.candidates)
        state = State(problem, [0 if c.stores else ABSENT for c in problem.candidates])
        for _ in range(40):
            before = state.result(), state.excess(), state.cost()
            members = rng.sample(range(count), rng.randint(1, min(4, count)))
            few = min(len(problem.candidates[v].stores) for v in members)
            undo = state.change(members, rng.choice([ABSENT, *range(few)]))
            expected = evaluate(problem, state.result())
            over = np.maximum(expected.live_bytes - problem.budget, 0).sum()
            assert state.excess() == over
            assert state.cost() == (inf if expected.missing else pytest.approx(expected.cost, abs=1e-6))
            if rng.random() < 0.5:
                state.undo(undo)
                assert (state.result(), state.excess()) == before[:2]
                assert state.cost() == pytest.approx(before[2], abs=1e-6)


def test_greedy_moves_never_end_above_where_they_began() -> None:
    rng = random.Random(0)
    for _ in range(60):
        problem = random_problem(rng, chains=True)
        start: Decision = tuple(0 if c.stores else ABSENT for c in problem.candidates)
        before = evaluate(problem, start)
        if before.missing:
            continue
        limited = replace(problem, budget=int(before.peak_bytes * rng.choice([0.5, 0.8, 1.0])))
        after = evaluate(limited, descend(limited, start, Effort(10**9)))
        assert not after.missing
        over = [int(np.maximum(e.live_bytes - limited.budget, 0).sum()) for e in (before, after)]
        assert over[1] < over[0] or over == [0, 0] or after.cost == before.cost
        if over[0] == 0:
            assert after.feasible and after.cost <= before.cost


def test_only_the_solvers_own_lines_are_taken_out_of_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with _without_lines(b"HighsMip"):
        os.write(1, b"one\nHighsMipSolverData::x\ntwo\n")
    os.write(1, b"HighsMip after\n")
    assert capfd.readouterr().out == "one\ntwo\nHighsMip after\n"


def test_the_same_plan_every_time() -> None:
    root = Path(__file__).parents[2]
    options = json.dumps({"mode": "4:1", "budget": "38MiB", "plan_seconds": 120})
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.plan_once", options], cwd=root, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        )
        for seed in ("0", "1")
    ]  # fmt: skip
    one, other = (run.communicate(timeout=300)[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert one == other
    assert json.loads(one)["plan"]["budget_bytes"] == 38 * 2**20  # it went through the planner
