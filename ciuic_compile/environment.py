"""What a plan was made with: versions, and the device that it is for."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from .types import Environment


def environment(device: str) -> Environment:
    """Of this process.

    Args:
        device: name of the device profile.
    """
    import ciuic_compile

    return Environment(
        ciuic=ciuic_compile.__version__,
        torch=torch.__version__,
        triton=_version("triton") or _version("pytorch-triton"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        device=device,
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
