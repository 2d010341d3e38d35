"""The two-line form: ``enable_compression()`` once, then plain ``torch.compile(model)``."""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch._dynamo.backends import registry

from .config import set_default_config
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


def plans() -> tuple[Plan, ...]:
    """Plans of every training graph compiled in this process, in the order they were compiled."""
    from .backend import plans

    return plans()


def register() -> None:
    """Make the name "ciuic" known to Dynamo, also where the package runs uninstalled from its sources."""
    entry = EntryPoint("ciuic", "ciuic_compile.backend:ciuic", "torch_dynamo_backends")
    registry._BACKENDS.setdefault("ciuic", entry)
