"""``ciuic check``: fail where a training step takes more memory than was accepted."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ciuic_compile.cli import exit_codes, files, gate, new_parser

if TYPE_CHECKING:
    from ciuic_compile.gate.baseline import Accepted
    from ciuic_compile.gate.compare import Check
    from ciuic_compile.gate.settings import Entry, Settings

EXAMPLES = """
ciuic check
ciuic check gpt --format github
ciuic check --config models/ciuic.toml --format junit -o ciuic.xml
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic check``."""
    parser = new_parser(
        subparsers, "check", "fail where a training step takes more memory than was accepted", EXAMPLES
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="entries of ciuic.toml (default: all)")
    gate.add_files(parser)
    gate.add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Plan the entries, compare them with the baseline, say what was found."""
    from ciuic_compile.gate import baseline, settings
    from ciuic_compile.gate.compare import exit_code
    from ciuic_compile.gate.formats import Outcome

    found = settings.load(args.config)
    path = args.baseline or found.baseline
    files.check([args.output], [str(found.path), str(path), *gate.entry_inputs(found.entries)])
    entries = found.chosen(args.names)
    # without a baseline each entry is told to have none; a hard_limit holds all the same
    accepted = baseline.load_if_there(path)
    checks = tuple(_check(entry, found, accepted.entries.get(entry.name)) for entry in entries)
    known = {entry.name for entry in found.entries}
    notes = tuple(
        f"{path} has an entry {name!r} that {found.path} does not; ciuic accept --all drops it"
        for name in sorted(accepted.entries)
        if name not in known
    )
    code = exit_code(checks)
    gate.show(Outcome("check", checks, code, notes), args)
    return code


def _check(entry: Entry, found: Settings, accepted: Accepted | None) -> Check:
    from ciuic_compile.errors import CiuicError, InfeasibleBudgetError
    from ciuic_compile.gate import compare
    from ciuic_compile.gate.plan_entry import plan_entry

    file = found.path.as_posix()
    try:
        now = plan_entry(entry)
    except CiuicError as error:
        if exit_codes.of(error) == exit_codes.INTERNAL:
            raise
        infeasible = isinstance(error, InfeasibleBudgetError)
        title, _, more = str(error).partition("\n")
        return compare.Check(
            entry.name,
            compare.Status.INFEASIBLE if infeasible else compare.Status.ERROR,
            title,
            details=tuple(line.strip() for line in more.splitlines()),
            settings_file=file,
            line=entry.line,
        )
    return compare.check(entry, now, accepted, environment=found.environment, settings_file=file)
