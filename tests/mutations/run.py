"""Run the mutation corpus: what ``ciuic check`` says of every edit, and what it should say.

    python -m tests.mutations.run [--jobs 2] [--only gpt] [--no-ops 200] [--json out.json]

A regression must fail the check, and the first culprit be a line of the edit (or one that corpus.toml calls
right). Each is checked alone, and again among edits that change nothing, as in a pull request. An edit that
changes nothing must pass. Plans on fake tensors: no GPU, no weights. Takes about 2 s of one core an edit.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ciuic_compile import planning, targets
from ciuic_compile.gate import compare, settings
from ciuic_compile.gate.baseline import Accepted
from ciuic_compile.gate.record import Record, record
from tests.mutations import noops
from tests.mutations.corpus import REGRESSIONS, Regression, files

SEED = 20
MODELS = ("gpt", "llama", "convnet", "vit", "moe")
_TAG = "  # <- the culprit"


@dataclass(frozen=True)
class Edit:
    """One edited tree, and what should be said of it.

    Attributes:
        kind: "alone" or "in company" for regressions, else the kind of edit that changes nothing.
        right: (file, line) that may be the first culprit; empty where nothing should be flagged.
    """

    name: str
    kind: str
    entry: str
    files: dict[str, str]
    right: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True)
class Outcome:
    """What the check said of one edit, and how the figures moved (shares of the baseline's)."""

    name: str
    kind: str
    entry: str
    regression: bool
    status: str
    peak: float
    fixed: float
    more_bytes: int
    first: str
    culprits: tuple[str, ...]
    right: bool
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the check said what it should, the culprit apart."""
        return (self.status == "regression") == self.regression and self.status in (
            "regression",
            "pass",
            "improved",
        )


# ---------------------------------------------------------------- edits


def regressions(only: str = "", company: bool = True) -> list[Edit]:
    """Every regression alone, and in company with five edits that change nothing in the same file."""
    made = []
    for r in REGRESSIONS:
        if only in r.name:
            made += [_alone(r)] + ([_in_company(r)] if company and r.file.endswith(".py") else [])
    return made


def unchanged(count: int, only: str = "", seed: int = SEED) -> list[Edit]:
    """``count`` edits that change nothing, the models in turn."""
    originals, made = files(), []
    for i, model in enumerate(MODELS):
        share = count // len(MODELS) + (i < count % len(MODELS))
        if only in model:
            made += [
                Edit(f"{model}: {e.kind}: {e.detail}", e.kind, model, {**originals, f"{model}.py": e.text})
                for e in noops.edits(originals[f"{model}.py"], share, seed + i)
            ]
    return made


def all_at_once(seed: int = SEED) -> list[Edit]:
    """For each model, one edit of every kind at the same time."""
    originals = files()
    return [
        Edit(f"{m}: {e.kind}: {e.detail}", e.kind, m, {**originals, f"{m}.py": e.text})
        for m in MODELS
        for e in [noops.all_at_once(originals[f"{m}.py"], seed)]
    ]


def _alone(r: Regression) -> Edit:
    originals = files()
    edited = {**originals, r.file: r.apply(originals[r.file])}
    return Edit(r.name, "alone", r.entry, edited, frozenset(r.right_answers(originals)))


def _in_company(r: Regression, count: int = 5) -> Edit:
    originals = files()
    lines = r.apply(originals[r.file]).splitlines()
    for _, number in r.right_answers(originals):
        lines[number - 1] += _TAG
    text = "\n".join(lines) + "\n"
    rng = random.Random(r.name)
    for kind in rng.sample(sorted(noops.KEEP_COMMENTS), count):
        possible = [new for _, new in noops.KINDS[kind](text) if new.count(_TAG) == text.count(_TAG)]
        text = rng.choice(possible) if possible else text
    tagged = {(r.file, n) for n, line in enumerate(text.splitlines(), 1) if _TAG in line}
    return Edit(
        r.name, "in company", r.entry, {**originals, r.file: text.replace(_TAG, "")}, frozenset(tagged)
    )


# ---------------------------------------------------------------- checks


class Project:
    """A folder with the models, in which checks are run as ``ciuic check`` would; baselines are made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._accepted: dict[str, Record] = {}

    def outcome(self, edit: Edit) -> Outcome:
        """Check one edited tree against the baseline of the tree as it was."""
        if edit.entry not in self._accepted:
            self._accepted[edit.entry] = self._planned(files(), edit.entry)[1]
        before = self._accepted[edit.entry]
        start = time.process_time()
        entry, now = self._planned(edit.files, edit.entry)
        check = compare.check(entry, now, Accepted(before))
        found = [(c.file, c.line) for c in check.culprits]
        return Outcome(
            name=edit.name,
            kind=edit.kind,
            entry=edit.entry,
            regression=bool(edit.right),
            status=check.status.value,
            peak=now.peak_bytes / before.peak_bytes - 1,
            fixed=now.input_bytes / before.input_bytes - 1,
            more_bytes=now.total_bytes - before.total_bytes,
            first=f"{check.culprits[0].where} {check.culprits[0].code}" if found else "",
            culprits=tuple(f"{c.where} {c.code}" for c in check.culprits),
            right=bool(found) and found[0] in edit.right,
            seconds=round(time.process_time() - start, 2),
        )

    def _planned(self, tree: dict[str, str], name: str) -> tuple[settings.Entry, Record]:
        for file, text in tree.items():
            (self._folder / file).write_text(text, "utf-8")
        with contextlib.chdir(self._folder), _fresh_modules():
            (entry,) = settings.load(Path(settings.FILE)).chosen([name])
            target = targets.load(entry.target)
            plans = planning.plan(
                target.model,
                target.inputs,
                target.loss_fn,
                options=entry.options,
                device=entry.device,
                autocast=entry.autocast,
            )
            return entry, record(plans, entry, target.model, target.inputs)


@contextlib.contextmanager
def _fresh_modules() -> Iterator[None]:
    """Models are imported anew, and forgotten; Dynamo's and linecache's memory of their files as well."""
    import linecache

    linecache.clearcache()
    try:
        yield
    finally:
        for model in MODELS:
            sys.modules.pop(model, None)
        torch._dynamo.reset()
        gc.collect()


def run(edits: Sequence[Edit], jobs: int = 1) -> list[Outcome]:
    """Check all edits, in processes of their own where there are several jobs."""
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    if jobs == 1:
        with tempfile.TemporaryDirectory() as folder:
            project = Project(Path(folder))
            return [_told(project.outcome(edit)) for edit in edits]
    ordered = sorted(edits, key=lambda e: e.entry)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        parts = pool.map(run, [ordered[i::jobs] for i in range(jobs)])
    return [outcome for part in parts for outcome in part]


def _told(outcome: Outcome) -> Outcome:
    if "PYTEST_CURRENT_TEST" not in os.environ:
        sign = "ok " if outcome.good and (outcome.right or not outcome.regression) else "BAD"
        print(
            f"{sign} {outcome.name} [{outcome.kind}] {outcome.status} {outcome.peak:+.1%} {outcome.first}",
            file=sys.stderr,
            flush=True,
        )
    return outcome


# ---------------------------------------------------------------- table


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table, and what went wrong."""
    lines = [
        "| edits | number | flagged | culprit line first | among the first five |",
        "|---|---|---|---|---|",
    ]
    for title, chosen in (
        ("regressions, alone", [o for o in outcomes if o.kind == "alone"]),
        ("regressions among five edits that change nothing", [o for o in outcomes if o.kind == "in company"]),
        ("edits that change nothing", [o for o in outcomes if not o.regression]),
    ):
        if chosen:
            flagged = sum(o.status == "regression" for o in chosen)
            first = f"{sum(o.right for o in chosen)}" if chosen[0].regression else ""
            lines.append(f"| {title} | {len(chosen)} | {flagged} | {first} | |")
    wrong = [o for o in outcomes if not o.good or (o.regression and not o.right)]
    lines += ["", *(f"- {o.name} ({o.kind}): {o.status}, first culprit {o.first or 'none'}" for o in wrong)]
    return "\n".join(lines)


def main() -> None:
    """Run all, print the table, end with status 1 where the aims are missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="part of the names of regressions, or a model")
    parser.add_argument("--no-ops", type=int, default=200, help="edits that change nothing (default: 200)")
    parser.add_argument("--json", type=Path, help="write every outcome here")
    args = parser.parse_args()
    edits = regressions(args.only)
    if args.no_ops:
        edits += all_at_once() + unchanged(args.no_ops, args.only)
    start = time.time()
    outcomes = run(edits, args.jobs)
    print(table(outcomes))
    print(
        f"\n{len(outcomes)} plans, {sum(o.seconds for o in outcomes):.0f} s of CPU, {time.time() - start:.0f} s "
        f"({platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__})"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    wanted = [o for o in outcomes if o.regression]
    named = sum(o.right for o in wanted)
    sys.exit(0 if all(o.good for o in outcomes) and named >= 0.9 * len(wanted) else 1)


if __name__ == "__main__":
    main()
