"""What ``check``, ``accept`` and ``diff`` share: their files, formats and output. No command of its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ciuic_compile.cli import files

if TYPE_CHECKING:
    from ciuic_compile.gate.formats import Outcome
    from ciuic_compile.gate.settings import Entry

FORMATS = ("text", "json", "md", "junit", "sarif", "github")


def add_files(parser: argparse.ArgumentParser) -> None:
    """Where settings and baseline are."""
    parser.add_argument(
        "--config",
        type=Path,
        default=Path("ciuic.toml"),
        metavar="FILE",
        help="settings (default: ciuic.toml)",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="baseline (default: as the settings say, ciuic-baseline.json)",
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """How the outcome is written, and where."""
    parser.add_argument("--format", choices=FORMATS, default="text", help="of the outcome (default: text)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write it there, and the text to stdout"
    )


def entry_inputs(entries: Iterable[Entry]) -> list[str]:
    """The files that planning entries reads."""
    return [file for e in entries for file in files.read_for(e.target, e.options, e.device)]


def show(outcome: Outcome, args: argparse.Namespace) -> None:
    """Print the outcome, or write it to the file that was asked for and print its text.

    Raises:
        OutputError: the file cannot be written; it is as it was.
    """
    from ciuic_compile.gate.formats import render

    if args.output is None:
        sys.stdout.write(render(outcome, args.format))
        return
    files.write({str(args.output): render(outcome, args.format)})
    sys.stdout.write(render(outcome, "text"))
