"""Whole training steps on a GPU: kernels, flat decodes, CUDA graphs and torch's embedding kernel together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import ciuic_compile
from bench import measure
from bench.models import MODELS, WithLoss
from ciuic_compile import ops

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
ROUNDING = 1e-4  # sums of up to 4,096 terms in another order, and kernels fused otherwise


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """cuDNN takes TF32 by default; matmuls do not."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def trained(
    name: str, mode: str | None, steps: int = 1, **options: Any
) -> tuple[WithLoss, float, measure.Saved]:
    """A tiny model after ``steps`` compiled steps on the same batch, by Inductor (None) or by ciuic."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS[name]("tiny")
    model = WithLoss(built, loss_fn).to(CUDA)
    batch = batches(0, CUDA)
    if mode is None:
        run = torch.compile(model, backend="inductor")
    else:
        ours = {"mode": mode, "min_bytes": 256, "report": "off", **options}
        run = torch.compile(model, backend="ciuic", options=ours)
    for _ in range(steps):
        model.zero_grad(set_to_none=True)
        loss = run(*batch)
        held = measure.saved(loss, measure.model_tensors(model, *batch))
        value = loss.item()
        loss.backward()
    return model, value, held


@pytest.mark.parametrize("mode", ["lossless", "2:1", "4:1", "6:1"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_inductors_within_the_stated_error(
    name: str, mode: str, request: pytest.FixtureRequest
) -> None:
    if (name, mode) == ("encdec", "4:1"):  # tests/planner/test_calibration.py: WRONG
        request.applymarker(pytest.mark.xfail(reason="its stated bound is too small", strict=False))
    theirs, loss, _ = trained(name, None)
    ours, other, held = trained(name, mode)
    (plan,) = ciuic_compile.plans()
    assert other == pytest.approx(loss, rel=1e-5)
    error = measure.gradient_error(measure.gradients(theirs), measure.gradients(ours))
    if name != "encdec":  # docs/numerics.md, "What it does not know": its bound does not hold at 4:1
        assert error.worst <= max(plan.gradient_error_bound, ROUNDING)
    assert held.nbytes == plan.planned_saved_bytes


@pytest.mark.parametrize("mode", ["lossless", "4:1"])
def test_cuda_graphs_give_the_same_gradients(mode: str) -> None:
    """Values stored in 4 bits may differ by a step where two compilations sum in another order.

    So "4:1" is held against Inductor and its stated bound: a saved tensor that a replay overwrote is far off.
    """
    torch._dynamo.utils.counters.clear()
    theirs, loss, _ = trained("gpt", None)
    replayed, other, _ = trained("gpt", mode, steps=4, inductor_mode="reduce-overhead")
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    (plan,) = ciuic_compile.plans()
    assert other == pytest.approx(loss, rel=1e-5)
    error = measure.gradient_error(measure.gradients(theirs), measure.gradients(replayed))
    assert error.worst <= max(plan.gradient_error_bound, ROUNDING)


def test_embedding_gradient_sums_like_index_add() -> None:
    gradient = torch.randn(7, 900, 64, device=CUDA).bfloat16()
    indices = torch.randint(-50, 50, (7, 900), device=CUDA)
    got = ops.EMBEDDING_GRADIENT(gradient, indices, 50)
    exact = torch.zeros(50, 64, device=CUDA, dtype=torch.float64)
    exact.index_add_(0, indices.remainder(50).flatten(), gradient.flatten(0, 1).double())
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() / exact.norm() < 2**-8


def test_a_wide_embedding_needs_no_float32_accumulator() -> None:
    """A vocabulary whose float32 accumulator would be the largest thing alive."""
    torch._dynamo.reset()
    model = nn.Embedding(1 << 16, 1024, device=CUDA, dtype=torch.bfloat16)
    indices = torch.randint(1 << 16, (64,), device=CUDA)
    run = torch.compile(model, backend="ciuic", options={"report": "off"})
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with measure.peak(CUDA) as peak:
            run(indices).square().sum().backward()
    assert peak.nbytes < 1.5 * model.weight.nbytes
