"""The two-line form: ``enable_compression()`` once, then plain ``torch.compile(model)``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends import registry

from .calibration import Calibration
from .config import set_default_config
from .devices import DeviceProfile
from .types import Plan

_inductor_compile = torch.compile


def enable_compression(mode: str = "4:1", **options: Any) -> None:
    """Make ``torch.compile(model)`` use ciuic with these options from now on, in this process.

    Calls that name a ``backend`` are left alone; ``torch.compile(mode=..., options=...)`` still work and
    override what is given here.

    Args:
        mode: "R:1", "lossless" or "off".
        options: any other option of docs/options.md.

    Raises:
        OptionError: a wrong option; nothing is changed then.
    """
    set_default_config({"mode": mode, **options})

    @functools.wraps(_inductor_compile)
    def compile_with_ciuic(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("backend", "ciuic")
        return _inductor_compile(*args, **kwargs)

    torch.compile = compile_with_ciuic


def disable_compression() -> None:
    """Undo :func:`enable_compression`; models that are compiled already stay as they are."""
    set_default_config()
    torch.compile = _inductor_compile


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    steps: int = 2,
) -> Calibration:
    """Measure on a few batches what errors in saved tensors do to the gradients of ``model``.

    The result, as ``options={"calibration": ...}`` or saved to a file whose path is given there, makes the
    plan's stated ``gradient_error`` rest on measurements instead of a guess from shapes. It holds at any
    batch size, so small batches will do. A step costs a step run op by op and a backward more for each
    class of saved tensors (two to five), and about twice the memory of an eager step. Parameters,
    gradients, buffers and random number generators are left as they were.

    Args:
        model: compiled or not, on the device and in the mode (train, autocast around this call) of training.
        batches: e.g. a data loader, or a list. A batch ``(x, *rest)`` gives ``loss_fn(model(x), *rest)``, or
            ``model(x, *rest)`` without a ``loss_fn``; a dict is unpacked as keyword arguments.
        loss_fn: returns the loss; None: the model returns it, itself or as ``.loss`` or ``["loss"]``.
        steps: how many batches to take, at least 1.

    Raises:
        CalibrationError: no batch, no loss, or no gradient that could be measured.
    """
    from .calibrating import calibrate

    return calibrate(model, batches, loss_fn, steps)


def measure_device(device: str | torch.device | None = None, *, seconds: float = 1.0) -> DeviceProfile:
    """Measure memory bandwidth and matmul rate of a device that is here, for the option ``device``.

    Medians of ``torch.utils.benchmark``: a copy within the device's memory (a GiB on a GPU) and a bfloat16
    matmul. Keep the device idle meanwhile. ``save(path)`` the result, and give the path, which ends in .json,
    as ``options={"device": path}`` on any machine.

    Args:
        device: None: the GPU where there is one, else the CPU.
        seconds: how long each of the two is repeated.

    Raises:
        CalibrationError: that device is not here.
    """
    from .measuring import measure_device

    return measure_device(device, seconds=seconds)


def plans() -> tuple[Plan, ...]:
    """Plans of every training graph compiled in this process, in the order they were compiled."""
    from .backend import plans

    return plans()


def register() -> None:
    """Make the name "ciuic" known to Dynamo, also where the package runs uninstalled from its sources."""
    entry = EntryPoint("ciuic", "ciuic_compile.backend:ciuic", "torch_dynamo_backends")
    registry._BACKENDS.setdefault("ciuic", entry)
