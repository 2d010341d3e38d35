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
@pytest.mark.parametrize("name", ["gpt", "llama", "vit", "resnet50"])
def test_stated_errors_hold(name: str, mode: str) -> None:
    """The bound holds and is within 6 of the worst parameter; the whole is within a factor of FACTOR."""
    captured, found = planned(name, mode)
    assert found.worst <= captured.plan.gradient_error_bound <= 6 * found.worst
    assert found.whole / FACTOR[name] <= captured.plan.gradient_error <= found.whole * FACTOR[name]


@pytest.mark.parametrize("mode", ["2:1", "4:1", "6:1"])
@pytest.mark.parametrize("name", ["unet", "moe"])
def test_bounds_hold_for_models_that_were_not_calibrated_on(name: str, mode: str) -> None:
    """Encoder-decoders are not among them: docs/numerics.md, "What it does not know"."""
    captured, found = planned(name, mode)
    assert found.worst <= captured.plan.gradient_error_bound


#: Random weights of std 0.02 at width 64 are far from what the guessed energies are about: most of the
#: gradient is in the head, or (ResNet, batch 4) in the stem. docs/numerics.md has the "small" size.
FACTOR = {"gpt": 3.0, "llama": 2.5, "vit": 2.25, "resnet50": 4.0}


def test_stated_errors_follow_the_plan() -> None:
    """The calibration can tell plans apart: more compression, more error, measured and stated."""
    for measure in (lambda c, e: c.plan.gradient_error, lambda c, e: e.whole):
        values = [measure(*planned("gpt", mode)) for mode in ("2:1", "4:1", "6:1")]
        assert values == sorted(values) and values[-1] > 5 * values[0]
