"""``ciuic explain``: say what is alive at the peak, and why a tensor is kept, compressed or recomputed."""

from __future__ import annotations

import argparse
from typing import Any

from ciuic_compile.cli import new_parser

EXAMPLES = "ciuic explain train.py:make_model"


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic explain``."""
    parser = new_parser(
        subparsers,
        "explain",
        "say what is alive at the peak, and why a tensor is kept, compressed or recomputed",
        EXAMPLES,
    )
    parser.add_argument("target", metavar="TARGET")


def run(args: argparse.Namespace) -> int:
    """Do it, and return the exit status."""
    raise NotImplementedError
