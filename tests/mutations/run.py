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
import io
import json
import logging
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ciuic_compile import cli
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
    """What the check said of one edit.

    Attributes:
        regression: whether it should be flagged.
        figures: before and now, by the names that the check has for them.
        place: of the first right one among the culprits, from 1; 0: none is right.
        seconds: of this process's CPU.
    """

    name: str
    kind: str
    entry: str
    regression: bool
    status: str
    title: str
    figures: dict[str, tuple[float, float]]
    culprits: tuple[str, ...]
    place: int
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the check failed where it should, and only there."""
        return self.status == "regression" if self.regression else self.status == "pass"

    def share(self, figure: str) -> float:
        """How much a figure grew, as a share of what it was."""
        before, now = self.figures.get(figure, (1, 1))
        return now / before - 1

    @property
    def large(self) -> bool:
        """Whether it needs 2% or 64 MiB more, or breaks the graph, after which not all is counted."""
        more = sum(self.figures[f][1] - self.figures[f][0] for f in ("peak", "parameters and inputs"))
        rise = max(self.share("peak"), self.share("parameters and inputs"))
        return rise >= 0.02 or more >= 64 * 2**20 or self.share("compiled graphs") > 0


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
    """A folder with the models, in which ``ciuic accept`` and ``ciuic check`` run, in this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._accepted: set[str] = set()

    def outcome(self, edit: Edit) -> Outcome:
        """What ``ciuic check`` says of a tree, whose baseline is that of the tree as it was."""
        if edit.entry not in self._accepted:
            self._accepted.add(edit.entry)
            code, said = self._ciuic(files(), "accept", edit.entry, "-m", "as it was")
            assert code == 0, said
        start = time.process_time()
        code, said = self._ciuic(edit.files, "check", edit.entry, "--format", "json")
        seconds = time.process_time() - start
        (check,) = json.loads(said)["entries"]
        assert check["exit_code"] == code
        figures = {m["name"]: (m["before"], m["now"]) for m in check["measures"]}
        found = [(c["file"], c["line"]) for c in check["culprits"]]
        named = tuple(f"{c['file']}:{c['line']} {c['code']}" for c in check["culprits"])
        return Outcome(
            name=edit.name,
            kind=edit.kind,
            entry=edit.entry,
            regression=bool(edit.right),
            status=check["status"],
            title=check["title"],
            figures=figures,
            culprits=named,
            place=next((i for i, at in enumerate(found, 1) if at in edit.right), 0),
            seconds=round(seconds, 2),
        )

    def _ciuic(self, tree: dict[str, str], *command: str) -> tuple[int, str]:
        for file, text in tree.items():
            (self._folder / file).write_text(text, "utf-8")
        said = io.StringIO()
        here = Path.cwd()
        os.chdir(self._folder)
        try:
            with contextlib.redirect_stdout(said):
                return cli.main(command), said.getvalue()
        finally:
            os.chdir(here)
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


def _told(o: Outcome) -> Outcome:
    if "PYTEST_CURRENT_TEST" not in os.environ:
        sign = "ok " if o.good and (o.place == 1 or not o.regression) else "BAD"
        first = o.culprits[0] if o.culprits else ""
        print(
            f"{sign} {o.name} [{o.kind}] {o.status} {o.place} {o.share('peak'):+.1%} {first}", file=sys.stderr
        )
    return o


# ---------------------------------------------------------------- table


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table, and what went wrong."""
    lines = [
        "| edits | number | flagged | culprit first | among the first five |",
        "|---|---|---|---|---|",
    ]
    for title, chosen in (
        ("regressions alone", [o for o in outcomes if o.kind == "alone"]),
        ("regressions among five edits that change nothing", [o for o in outcomes if o.kind == "in company"]),
        ("edits that change nothing", [o for o in outcomes if not o.regression]),
    ):
        if chosen:
            flagged = sum(o.status != "pass" for o in chosen)
            named = f"{sum(o.place == 1 for o in chosen)} | {sum(o.place > 0 for o in chosen)}"
            lines.append(
                f"| {title} | {len(chosen)} | {flagged} | {named if chosen[0].regression else ' | '} |"
            )
    wrong = [o for o in outcomes if not o.good or (o.regression and o.place != 1)]
    said = (f"- {o.name} ({o.kind}): {o.status}; {', '.join(o.culprits[:1]) or o.title}" for o in wrong)
    return "\n".join([*lines, "", *said])


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
        f"\n{len(outcomes)} plans, {sum(o.seconds for o in outcomes):.0f} s of CPU, "
        f"{time.time() - start:.0f} s with {args.jobs} jobs on {os.cpu_count()} {platform.machine()} cores, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
    if args.json:
        args.json.write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
    wanted = [o for o in outcomes if o.regression]
    named = sum(o.place == 1 for o in wanted)
    sys.exit(0 if all(o.good for o in outcomes) and named >= 0.9 * len(wanted) else 1)


if __name__ == "__main__":
    main()
