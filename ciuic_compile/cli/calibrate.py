"""``ciuic calibrate``: measure what errors in saved tensors do to gradients."""

from __future__ import annotations

import argparse
from typing import Any

from ciuic_compile.cli import new_parser

EXAMPLES = "ciuic calibrate train.py:make_model"


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic calibrate``."""
    parser = new_parser(
        subparsers, "calibrate", "measure what errors in saved tensors do to gradients", EXAMPLES
    )
    parser.add_argument("target", metavar="TARGET")


def run(args: argparse.Namespace) -> int:
    """Do it, and return the exit status."""
    raise NotImplementedError
