"""A ratio is met; where memory is short, what adds less error than rounding is saved beyond it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from bench.plan_time import deep
from ciuic_compile import Plan, partitioner, planning
from ciuic_compile.analyze import MemoryModel
from ciuic_compile.planner import Codecs, choose_codecs, rounding_error
from tests.stages import memory_of_the_device, stage

WIDTH = 64


class Residual(nn.Module):
    """Layers whose saved tensors are large beside the error that one of them makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def planned(dtype: torch.dtype, memory: int, **options: Any) -> tuple[Codecs, MemoryModel]:
    """The chosen codecs on a device with so much memory."""
    with memory_of_the_device(memory):
        found = stage(
            Residual().to(dtype), torch.randn(256, WIDTH, dtype=dtype, requires_grad=True), **options
        )
        return choose_codecs(found.model, found.selection), found.model


def allowed(model: MemoryModel) -> int:
    """Bytes that the ratio allows."""
    assert model.config.ratio is not None
    return int(model.baseline_bytes / model.config.ratio)


def test_short_is_an_eighth_of_the_devices_memory() -> None:
    _, model = planned(torch.bfloat16, 2**40, mode="1.7:1")
    assert not model.short_of_memory
    for memory, short in ((8 * model.baseline_bytes, True), (8 * model.baseline_bytes + 1, False)):
        assert planned(torch.bfloat16, memory, mode="1.7:1")[1].short_of_memory is short
    assert not planned(torch.bfloat16, 1, mode="lossless")[1].short_of_memory


def test_it_goes_on_where_rounding_hides_the_error() -> None:
    """With memory to spare it stops at the ratio, and encodes no more than that needs."""
    codecs, model = planned(torch.bfloat16, 1, mode="1.5:1")
    assert codecs.nbytes < 0.9 * allowed(model)
    assert codecs.variance <= rounding_error(model) ** 2 * (1 + 1e-6)
    spared, model = planned(torch.bfloat16, 2**40, mode="1.5:1")
    assert 0.9 * allowed(model) < spared.nbytes <= allowed(model)


@pytest.mark.parametrize(
    ("dtype", "mode"), [(torch.float32, "3.5:1"), (torch.float16, "1.7:1"), (torch.bfloat16, "2.5:1")]
)
def test_it_stops_at_the_ratio_where_error_counts(dtype: torch.dtype, mode: str) -> None:
    codecs, model = planned(dtype, 1, mode=mode)
    assert codecs.variance > rounding_error(model) ** 2
    assert 0.9 * allowed(model) < codecs.nbytes <= allowed(model)


def test_the_users_own_cap_comes_first() -> None:
    free, model = planned(torch.bfloat16, 1, mode="1.5:1")
    cap = 0.9 * rounding_error(model)
    capped, _ = planned(torch.bfloat16, 1, mode="1.5:1", max_error=cap)
    assert capped.variance <= cap**2 * (1 + 1e-6)
    assert capped.nbytes > free.nbytes


def test_the_graphs_that_a_plan_was_judged_on_are_those_of_its_draft() -> None:
    """Simulated once: the draft made of copies of the partitioned graphs is the same."""
    model, ids = deep(4)

    def plan_within(share: float | None) -> Plan:
        options = {"mode": "lossless"} if share is None else {"mode": "2:1", "budget": int(share * free)}
        (plan,) = planning.plan(model, (ids, ids), options=options)
        return plan

    free = plan_within(None).planned_peak_bytes
    with mock.patch.object(partitioner, "simulate", wraps=partitioner.simulate) as simulated:
        plan = plan_within(0.5)
        calls = simulated.call_count
        with mock.patch.object(partitioner, "_nodes", side_effect=lambda graphs: (("", graphs),)):
            again = plan_within(0.5)
    assert plan.tightened and simulated.call_count == 2 * calls + 1
    assert (plan.decisions, plan.planned_peak_bytes) == (again.decisions, again.planned_peak_bytes)
    assert plan.timeline == again.timeline and plan.timeline is not None
