"""The command ``ciuic``: one module a subcommand.

A module listed in :data:`COMMANDS` has

* ``add_parser(subparsers)``, which adds its parser, with a one-line ``help`` and examples as ``epilog``
  (:func:`new_parser` does both), and
* ``run(args) -> int``, which returns one of :mod:`~ciuic_compile.cli.exit_codes`, or raises.

A :class:`~ciuic_compile.errors.CiuicError` becomes one message on stderr and the exit status that
``exit_codes.of`` has for it; any other exception is a bug, and status 70. Modules import what is slow
(the planner, transformers) inside ``run``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

from ciuic_compile.cli import exit_codes
from ciuic_compile.errors import CiuicError

#: Modules of ``ciuic_compile.cli``, in the order of ``ciuic --help``.
COMMANDS: Final[tuple[str, ...]] = ("plan", "explain", "diff", "check", "accept", "verify", "calibrate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ``argv`` is without the program's name."""
    parser, modules = _parser()
    try:
        args, late = parser.parse_known_args(argv)
        if late and not _taken_late(args, late):
            parser.error(f"unrecognized arguments: {' '.join(late)}")
    except SystemExit as stop:  # argparse has printed; --help is 0, a wrong option 2
        return stop.code if isinstance(stop.code, int) else exit_codes.USAGE
    try:
        status = int(modules[args.command].run(args))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `ciuic plan ... | head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.PASS
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:  # a user's module that exits must not pass for a verdict
        return _failed(error, args.traceback)


def new_parser(
    subparsers: Any, name: str, summary: str, examples: str, details: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand's parser, whose help ends with ``examples``: lines that start with ``ciuic``."""
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description="\n".join([f"{summary[0].upper()}{summary[1:]}.", *textwrap.wrap(details, 79)]),
        epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    return parser


def _parser() -> tuple[argparse.ArgumentParser, dict[str, ModuleType]]:
    parser = argparse.ArgumentParser(
        prog="ciuic",
        description="See where a model's training memory goes, and keep it from growing. No GPU is needed.",
        epilog="`ciuic COMMAND --help` has examples. Exit status: 0 pass, 1 regression, 2 usage, 3 baseline "
        "missing or incompatible, 4 infeasible budget, 5 measured differs from planned, 70 internal error.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in COMMANDS}
    for module in modules.values():
        module.add_parser(subparsers)
    return parser, modules


def _taken_late(args: argparse.Namespace, late: Sequence[str]) -> bool:
    """Whether a last, optional argument came after options, where argparse does not look for it."""
    name = getattr(args, "optional", None)
    if name is None or getattr(args, name) is not None or len(late) != 1 or late[0].startswith("-"):
        return False
    setattr(args, name, late[0])
    return True


def _failed(error: BaseException, show: bool) -> int:
    if show:
        traceback.print_exception(error)
    elif isinstance(error, CiuicError):
        print(f"ciuic: {error}", file=sys.stderr)
    else:
        print(
            f"ciuic: internal error: {type(error).__name__}: {error}\n"
            "  fix: this is a bug; report it with the output of the same command and --traceback",
            file=sys.stderr,
        )
    return exit_codes.of(error)
