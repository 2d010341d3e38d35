"""``ciuic verify``: run a step and compare the measured peak with the plan."""

from __future__ import annotations

import argparse
from typing import Any

from ciuic_compile.cli import new_parser

EXAMPLES = "ciuic verify train.py:make_model"


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic verify``."""
    parser = new_parser(
        subparsers, "verify", "run a step and compare the measured peak with the plan", EXAMPLES
    )
    parser.add_argument("target", metavar="TARGET")


def run(args: argparse.Namespace) -> int:
    """Do it, and return the exit status."""
    raise NotImplementedError
