"""What a plan states about gradient errors, against what its codecs do to the benchmarks' models."""

from __future__ import annotations

import functools

import pytest
import torch

from bench.calibrate import Captured, capture
from bench.measure import GradientError, gradient_error
from bench.models import MODELS, WithLoss


@functools.cache
def planned(name: str, mode: str) -> tuple[Captured, GradientError]:
    """A tiny model's plan, and the measured error of its gradients."""
    torch.manual_seed(0)
    model, batches, loss = MODELS[name]("tiny")
    captured = capture(WithLoss(model, loss), batches(0, torch.device("cpu")), mode, min_bytes=256)
    codecs = {d.storage.name: d.codec for d in captured.plan.decisions if d.codec}
    return captured, gradient_error(captured.run({}), captured.run(codecs))


@pytest.mark.parametrize("mode", ["2:1", "4:1", "6:1"])
@pytest.mark.parametrize("name", MODELS)
def test_stated_errors_hold(name: str, mode: str, request: pytest.FixtureRequest) -> None:
    """The bound holds and is within 6 of the worst parameter; the whole is within a factor of FACTOR."""
    if (name, mode) in WRONG:
        request.applymarker(pytest.mark.xfail(reason=WRONG[name, mode], strict=True))
    captured, found = planned(name, mode)
    assert found.worst <= captured.plan.gradient_error_bound <= 6 * found.worst
    assert found.whole / FACTOR[name] <= captured.plan.gradient_error <= found.whole * FACTOR[name]


#: Random weights of std 0.02 at width 64 are far from what the guessed energies are about: most of the
#: gradient is in the head, or (ResNet, batch 4) in the stem. docs/numerics.md has the "small" size.
FACTOR = {"gpt": 3.0, "llama": 2.5, "vit": 2.25, "resnet50": 4.0, "unet": 5.5, "moe": 6.0, "encdec": 3.5}

#: Known to be wrong, to be mended in the error model: the bound is up to 16 times what happens, or too small.
WRONG = {
    ("unet", "2:1"): "bound 10 times the worst parameter's error",
    ("unet", "4:1"): "bound 11 times the worst parameter's error",
    ("unet", "6:1"): "bound 16 times the worst parameter's error",
    ("encdec", "2:1"): "bound 16 times, whole 35 times what happens",
    (
        "encdec",
        "4:1",
    ): "bound 0.042, error 0.080: the cross-attention's query, its gradient 6e-4 of the others",
}


def test_stated_errors_follow_the_plan() -> None:
    """The calibration can tell plans apart: more compression, more error, measured and stated."""
    for measure in (lambda c, e: c.plan.gradient_error, lambda c, e: e.whole):
        values = [measure(*planned("gpt", mode)) for mode in ("2:1", "4:1", "6:1")]
        assert values == sorted(values) and values[-1] > 5 * values[0]
