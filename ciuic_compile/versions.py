"""Versions of packages, of an installed ciuic-compile and of one that runs from a checkout alike."""

from __future__ import annotations

from importlib import metadata


def version(package: str) -> str:
    """The version of a package; empty where it has none: not installed, as a checkout on ``sys.path``."""
    if package == "ciuic-compile":  # what runs is not always what is installed
        import ciuic_compile

        return ciuic_compile.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
