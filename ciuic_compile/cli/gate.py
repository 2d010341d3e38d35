"""What ``check``, ``accept`` and ``diff`` share: their files, formats and output. No command of its own."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ciuic_compile.errors import OutputError

if TYPE_CHECKING:
    from ciuic_compile.gate.formats import Outcome

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


def check_output(args: argparse.Namespace) -> None:
    """Refuse before the work is done what could not be written after it.

    Raises:
        OutputError: the folder is missing.
    """
    path: Path | None = args.output
    if path is not None and (not path.absolute().parent.is_dir() or path.is_dir()):
        why = "it is a folder" if path.is_dir() else f"there is no folder {str(path.absolute().parent)!r}"
        raise OutputError(f"cannot write {str(path)!r}: {why}\n  fix: name a file in a folder that exists")


def show(outcome: Outcome, args: argparse.Namespace) -> None:
    """Print the outcome, or write it to the file that was asked for and print its text.

    Raises:
        OutputError: the file cannot be written; it is as it was.
    """
    from ciuic_compile.gate.formats import render
    from ciuic_compile.report.emit import write_atomically

    if args.output is None:
        sys.stdout.write(render(outcome, args.format))
        return
    try:
        write_atomically(str(args.output), render(outcome, args.format))
    except OSError as error:
        raise OutputError(
            f"cannot write {str(args.output)!r}: {error.strerror or error}; it is as it was"
        ) from error
    sys.stdout.write(render(outcome, "text"))
