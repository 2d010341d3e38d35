"""Feed-forwards in chunks: gradients of the unchunked step, a lower peak, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ciuic_compile
from bench.peaks import empty_kernels
from ciuic_compile import ops
from ciuic_compile.rows import FEED_FORWARD_CHUNK
from tests.stages import stage
from tests.training import Step, compiled, errors, interpreted, step

D, WIDE = 16, 48
ROUNDING = 5e-6
ON: dict[str, Any] = {"chunk_ffn": True}


class FeedForward(nn.Module):
    """Two residual feed-forwards after a norm, of the given activation."""

    def __init__(
        self, activation: Callable[[nn.Module, Tensor], Tensor], bias: bool, double: bool = False
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm = nn.LayerNorm(D)
        self.gate = nn.Linear(D, 2 * WIDE if double else WIDE, bias=bias)
        self.up, self.down = nn.Linear(D, WIDE, bias=bias), nn.Linear(WIDE, D, bias=bias)
        self.scale = nn.Parameter(torch.rand(WIDE) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(self.activation(self, self.norm(x)))
        return x.square().mean()


def swiglu(m: Any, h: Tensor) -> Tensor:
    return F.silu(m.gate(h)) * m.up(h)


ACTIVATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "swiglu": swiglu,
    "gelu": lambda m, h: F.gelu(m.up(h)),
    "relu squared": lambda m, h: F.relu(m.up(h)).square(),
    "scaled": lambda m, h: torch.tanh(m.up(h)) * m.scale,
    "gated by a number a token": lambda m, h: F.silu(m.up(h)) * h[..., :1].detach(),
}
DECLINED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "normalized inside": (lambda m, h: F.normalize(F.silu(m.up(h)), dim=-1), ""),
    "both halves of one matmul": (lambda m, h: F.silu(m.gate(h)[..., :WIDE]) * m.gate(h)[..., WIDE:], ""),
    "a factor as large": (
        lambda m, h: m.up(h) * h.repeat(1, 1, WIDE // D),
        "as large as the feed-forward's values",
    ),
}


eager = pytest.mark.usefixtures("eager_kernels")


@pytest.fixture
def eager_kernels() -> Iterator[None]:
    with interpreted():
        yield


def batch(rows: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x = torch.randn(2, rows // 2, D, generator=torch.Generator().manual_seed(1))
    return [x.to(dtype).requires_grad_()]


def was_chunked(found: Step) -> bool:
    return any("feed-forward" in n and " chunks of tokens" in n for n in found.plans[0].notes)


@eager
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_are_those_of_the_whole(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = FeedForward(ACTIVATIONS[name], bias)
    eager, ours = step(model, batch(), "eager"), step(model, batch(), "lossless", options=ON)
    assert was_chunked(ours), ours.plans[0].notes
    assert torch.allclose(eager.outputs[0], ours.outputs[0], rtol=1e-6)
    found = errors(eager, ours)
    assert len(found) > 3 and max(found.values()) < ROUNDING
    assert ours.saved.nbytes == ours.planned_saved_bytes
    assert ours.saved.nbytes < 2 * 16 * WIDE * 4  # less than one hidden value of each


@eager
def test_rows_that_do_not_divide() -> None:
    torch.manual_seed(0)
    model = FeedForward(swiglu, bias=True)
    eager, ours = step(model, batch(14), "eager"), step(model, batch(14), "lossless", options=ON)
    assert was_chunked(ours) and max(errors(eager, ours).values()) < ROUNDING


@eager
@pytest.mark.parametrize("mode", ["16:1", "24:1"])
def test_lossy_modes_keep_to_the_plan(mode: str) -> None:
    torch.manual_seed(0)
    model = FeedForward(swiglu, bias=False)
    eager, ours = step(model, batch(64), "eager"), step(model, batch(64), mode, options=ON)
    assert was_chunked(ours) and ours.saved.nbytes == ours.planned_saved_bytes
    assert ROUNDING < max(errors(eager, ours).values()) < ours.bound


@eager
def test_half_precision_is_as_close_to_the_exact_gradients() -> None:
    """Each chunk's product is rounded once more before it is accumulated."""
    torch.manual_seed(0)
    model = FeedForward(swiglu, bias=True).bfloat16()
    inputs = batch(64, torch.bfloat16)
    exact = step(model.double(), [inputs[0].detach().double().requires_grad_()], "eager")
    model = model.bfloat16()
    whole, ours = (step(model, inputs, "lossless", options={"chunk_ffn": c}) for c in (False, True))
    assert was_chunked(ours) and not was_chunked(whole)
    there, here = errors(exact, whole), errors(exact, ours)
    assert all(here[n] <= 1.5 * there[n] + 2e-3 for n in there), (there, here)


@eager
@pytest.mark.parametrize("name", DECLINED)
def test_what_is_not_understood_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    activation, why = DECLINED[name]
    model = FeedForward(activation, bias=False, double=True)
    eager, ours = step(model, batch(), "eager"), step(model, batch(), "lossless", options=ON)
    assert not was_chunked(ours)
    assert why in " ".join(ours.plans[0].notes)
    assert max(errors(eager, ours).values()) < ROUNDING


@eager
def test_small_ones_stay_whole_without_a_word() -> None:
    for options in ({}, {"chunk_ffn": False}):
        ours = step(FeedForward(swiglu, bias=False), batch(), "lossless", options=options)
        assert not any("feed-forward" in note for note in ours.plans[0].notes)


def test_values_made_again_wait_for_a_gradient_but_are_none() -> None:
    """What the error model takes for a gradient would get the error of all that the chunk waits for."""
    found = stage(FeedForward(swiglu, bias=False), *batch(), mode="lossless", **ON)
    captured = found.captured
    again = [n for n in captured.graph.nodes if n.meta.get(FEED_FORWARD_CHUNK) and captured.is_backward(n)]
    assert again and not captured.gradients.intersection(again)
    waiting = [n for n in captured.graph.nodes if n.target is ops.AFTER and captured.is_backward(n)]
    assert {n in captured.gradients for n in waiting} == {True, False}  # of dy, and of the hidden states


def test_the_replayed_peak_falls() -> None:
    """In the generated code chunks run one after the other: five hidden values and more are never alive."""
    d, wide, rows = 64, 256, 4096
    peaks = {}
    for chunk in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(Wide(d, wide) for _ in range(2)))
        with (
            empty_kernels(),
            torch._inductor.config.patch(fx_graph_cache=False),
            torch._functorch.config.patch(enable_autograd_cache=False),
        ):
            run = compiled(model, "lossless", options={"chunk_ffn": chunk})
            run(torch.zeros(rows, d)).sum().backward()
        (plan,) = ciuic_compile.plans()
        assert plan.replayed
        peaks[chunk] = plan.planned_peak_bytes
    assert peaks[True] < peaks[False] - 4 * rows * wide * 4


class Wide(nn.Module):
    """A residual SwiGLU."""

    def __init__(self, d: int, wide: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, wide), nn.Linear(d, wide), nn.Linear(wide, d)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(swiglu(self, x))
        return y
