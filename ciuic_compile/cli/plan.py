"""``ciuic plan``: plan a training step of a model and print the plan."""

from __future__ import annotations

import argparse
from typing import Any

from ciuic_compile.cli import new_parser

EXAMPLES = "ciuic plan train.py:make_model"


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic plan``."""
    parser = new_parser(subparsers, "plan", "plan a training step of a model and print the plan", EXAMPLES)
    parser.add_argument("target", metavar="TARGET")


def run(args: argparse.Namespace) -> int:
    """Do it, and return the exit status."""
    raise NotImplementedError
