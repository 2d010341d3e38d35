"""What a plan was made with: versions, and the device that it is for."""

from __future__ import annotations

import platform

import torch

from .types import Environment
from .versions import version


def environment(device: str) -> Environment:
    """Of this process.

    Args:
        device: name of the device profile.
    """
    return Environment(
        ciuic=version("ciuic-compile"),
        torch=torch.__version__,
        triton=version("triton") or version("pytorch-triton"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        device=device,
    )
