"""What a command plans: a function of the user's that makes a model, or a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Target:
    """A model and what it is called with.

    Attributes:
        name: as the user wrote it.
        model: its parameters allocate nothing.
        inputs: a tuple of positional arguments, or a dict of keyword arguments.
        loss_fn: ``loss_fn(model(...)) -> loss``; None: the model's output is or has the loss.
    """

    name: str
    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    loss_fn: Callable[..., Tensor] | None = None


def load(name: str) -> Target:
    """Make the model of ``package.module:function``, ``path/to/file.py:function`` or a Hugging Face config.

    Raises:
        TargetError: says what is missing or wrong, and where in the user's file.
    """
    raise NotImplementedError
