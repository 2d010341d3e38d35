"""``ciuic accept``: make what a training step takes now the baseline, with a reason."""

from __future__ import annotations

import argparse
import datetime
import os
from typing import Any

from ciuic_compile.cli import exit_codes, files, gate, new_parser
from ciuic_compile.errors import OptionError

EXAMPLES = """
ciuic accept gpt -m 'longer context, as planned in #12'
ciuic accept --all -m 'first baseline'
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of ``ciuic accept``."""
    parser = new_parser(
        subparsers, "accept", "make what a training step takes now the baseline, with a reason", EXAMPLES
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="entries of ciuic.toml")
    parser.add_argument(
        "--all", action="store_true", help="every entry; those no longer in ciuic.toml are dropped"
    )
    parser.add_argument("-m", "--message", metavar="WHY", help="the reason, kept in the baseline")
    gate.add_files(parser)


def run(args: argparse.Namespace) -> int:
    """Plan the entries and write them to the baseline; all of them or none."""
    from ciuic_compile.gate import baseline, settings
    from ciuic_compile.gate.compare import measure
    from ciuic_compile.gate.plan_entry import plan_entry

    if not (args.message or "").strip():
        raise OptionError("accept needs a reason\n  fix: ciuic accept NAME -m 'why this change is wanted'")
    if bool(args.names) == args.all:
        raise OptionError("accept needs either names of entries or --all\n  fix: ciuic accept NAME -m WHY")
    found = settings.load(args.config)
    path = args.baseline or found.baseline
    files.check([path], [str(found.path), *gate.entry_inputs(found.entries)])
    before = baseline.load_if_there(path)
    after = before
    if args.all:
        known = {entry.name for entry in found.entries}
        after = baseline.Baseline({n: e for n, e in before.entries.items() if n in known})
    said = [
        f"{name}: dropped, it is not in {found.path}" for name in before.entries if name not in after.entries
    ]
    for entry in found.chosen(args.names):
        now, old = plan_entry(entry), before.entries.get(entry.name)
        if old is not None and baseline.same(old.record, now):
            said.append(f"{entry.name}: unchanged")
            continue
        after = after.accept(entry.name, now, args.message.strip(), _today())
        peak = measure(now, old.record if old else None)[0]
        said.append(f"{entry.name}: accepted, peak {peak.words}")
    if after != before:
        baseline.save(after, path)
        said.append(f"{path} written; commit it")
    print("\n".join(said))
    return exit_codes.PASS


def _today() -> str:
    """The date in UTC; reproducible builds set it (https://reproducible-builds.org/specs/source-date-epoch)."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    utc = datetime.timezone.utc
    now = datetime.datetime.fromtimestamp(int(epoch), utc) if epoch.isdigit() else datetime.datetime.now(utc)
    return now.date().isoformat()
