"""Plans without a GPU, without weights and without running anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .types import Plan


def plan(
    model: nn.Module,
    example_inputs: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    device: str | None = None,
    autocast: str | None = None,
) -> tuple[Plan, ...]:
    """Plan one training step, as ``torch.compile(model, backend="ciuic", options=options)`` would.

    Args:
        model: parameters on any device, the meta device among them; nothing of it is changed.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        loss_fn: ``loss_fn(model(*example_inputs))``; None: the model returns the loss, itself or as ``.loss``
            or ``["loss"]``, or a tensor, of which the sum is taken.
        options: docs/options.md.
        device: as the option ``device``: profile of the device to plan for; None: that of the tensors.
        autocast: dtype ("bfloat16", "float16") of the autocast context around the step; None: none.

    Returns:
        One plan for each training graph that Dynamo made: one, unless there are graph breaks.
    """
    raise NotImplementedError
