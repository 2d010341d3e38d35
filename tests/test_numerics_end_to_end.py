"""What a step computes under each mode, through Inductor's generated code, against Inductor's own step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training import (
    MODES,
    ZOO,
    Lambda,
    errors,
    kernel_cache,
    mlp,
    only_kernels_cached,
    rows,
    step,
    zoo_step,
)

__all__ = ["kernel_cache"]

ROUNDING = 5e-6  # of float32 sums of up to 2,000 terms in another order: 40 units in the last place


def on_one_worker(names: Iterable[str]) -> list[Any]:
    """Each model's tests in one process of xdist's: :func:`zoo_step` remembers its steps."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


@pytest.fixture(autouse=True)
def inductor_cache(kernel_cache: Path) -> Iterator[Path]:
    with only_kernels_cached(kernel_cache) as folder:
        yield folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", on_one_worker(ZOO))
def test_forward_is_inductors_bit_for_bit(name: str, mode: str) -> None:
    theirs, ours = zoo_step(name, "inductor"), zoo_step(name, mode)
    assert len(ours.plans) == (mode != "off")
    assert all(torch.equal(a, b) for a, b in zip(theirs.outputs, ours.outputs, strict=True))
    for buffer, value in theirs.buffers.items():  # running statistics and their counter
        assert torch.equal(ours.buffers[buffer], value), buffer


@pytest.mark.parametrize("name", on_one_worker(ZOO))
def test_lossless_gradients_are_inductors(name: str) -> None:
    ours = zoo_step(name, "lossless")
    assert ours.bound == 0
    assert max(errors(zoo_step(name, "inductor"), ours).values()) < ROUNDING


@pytest.mark.parametrize("mode", ["2:1", "4:1", "6:1"])
@pytest.mark.parametrize("name", on_one_worker(ZOO))
def test_lossy_gradients_are_within_the_stated_bound(name: str, mode: str) -> None:
    ours = zoo_step(name, mode)
    found = errors(zoo_step(name, "inductor"), ours)
    assert {n: e for n, e in found.items() if e > max(ours.bound, ROUNDING)} == {}
    if any(d.codec and d.codec != "bitmask" for d in ours.plans[0].decisions):
        assert max(found.values()) > ROUNDING, "something was stored lossily, so something must differ"


@pytest.mark.parametrize("mode", ["lossless", "2:1", "4:1", "6:1"])
@pytest.mark.parametrize("name", on_one_worker(n for n in ZOO if n != "convnet"))
def test_measured_saved_bytes_are_the_planned_ones(name: str, mode: str) -> None:
    ours = zoo_step(name, mode)
    assert ours.saved.nbytes == ours.planned_saved_bytes
    assert zoo_step(name, "inductor").saved.nbytes == ours.plans[0].baseline_saved_bytes
    if mode != "lossless":
        assert ours.plans[0].ratio >= float(mode[0]) or "out of reach" in " ".join(ours.plans[0].notes)


@pytest.mark.xdist_group("convnet")
@pytest.mark.parametrize("mode", ["lossless", "4:1"])
def test_measured_saved_bytes_of_a_convnet(mode: str) -> None:
    """As planned. Inductor saves more than its partition says: channels-last copies of weights and images."""
    ours, theirs = zoo_step("convnet", mode), zoo_step("convnet", "inductor")
    assert ours.saved.nbytes == ours.planned_saved_bytes
    assert theirs.saved.nbytes > ours.plans[0].baseline_saved_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Lossless is as close to the float64 gradients as Inductor is; 4:1 keeps its bound around Inductor."""
    torch.manual_seed(0)
    model = mlp().to(dtype)
    exact = step(mlp_like(model).double(), [rows().to(dtype).double()], "eager")
    theirs = step(model, [rows().to(dtype)], "inductor")
    for mode in ("lossless", "4:1"):
        ours = step(model, [rows().to(dtype)], mode)
        assert torch.equal(ours.outputs[0], theirs.outputs[0])
        assert all(g.dtype == dtype for g in ours.gradients.values())
        there, here = errors(exact, theirs), errors(exact, ours)
        assert all(here[n] <= 1.5 * there[n] + ours.bound for n in there)


def mlp_like(model: nn.Module) -> nn.Module:
    """:func:`mlp` with the weights of ``model``."""
    copy = mlp()
    copy.load_state_dict(model.state_dict())
    return copy


def test_autocast_bfloat16() -> None:
    """As :func:`test_half_precision`: autocast's own rounding is the yardstick."""
    torch.manual_seed(0)

    def forward(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.float32):
            h = torch.nn.functional.gelu(layers[0](x))
            return layers[2](torch.nn.functional.layer_norm(layers[1](h), (64,)))

    model = Lambda(forward)
    exact = step(copy.deepcopy(model).double(), [rows().double()], "eager")
    theirs = step(model, [rows()], "inductor")
    for mode in ("lossless", "6:1"):
        ours = step(model, [rows()], mode)
        assert torch.equal(ours.outputs[0], theirs.outputs[0])
        assert all(g.dtype == torch.float32 for g in ours.gradients.values())
        there, here = errors(exact, theirs), errors(exact, ours)
        assert all(here[n] <= 1.5 * there[n] + ours.bound for n in there), (there, here)
        assert ours.saved.nbytes == ours.planned_saved_bytes
