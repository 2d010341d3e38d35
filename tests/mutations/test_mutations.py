"""``ciuic check`` on a fixed sample of the corpus; ``python -m tests.mutations.run`` runs all of it."""

from __future__ import annotations

import random

import pytest

from tests.mutations import noops, run
from tests.mutations.corpus import REGRESSIONS


def test_the_corpus_is_large_and_its_edits_apply() -> None:
    edits = run.regressions()
    assert len(REGRESSIONS) >= 40 and len({r.name for r in REGRESSIONS}) == len(REGRESSIONS)
    assert all(edit.right for edit in edits)
    for edit in edits:
        for name, text in edit.files.items():
            if name.endswith(".py"):
                compile(text, name, "exec")


def test_edits_that_change_nothing_are_many_of_all_kinds_and_repeatable() -> None:
    edits = run.unchanged(200)
    assert len({str(e.files) for e in edits}) == 200 and edits == run.unchanged(200)
    assert {e.kind for e in edits} >= noops.KINDS.keys() - {"method renamed"}
    assert not any(e.right for e in edits)


def test_edits_keep_the_tag_of_a_culprit() -> None:
    for edit in run.regressions():
        assert not any("<- the culprit" in text for text in edit.files.values())
        for file, line in edit.right:
            assert edit.files[file].splitlines()[line - 1].strip()


@pytest.mark.slow
def test_regressions_are_caught_and_the_culprit_is_named() -> None:
    rng = random.Random(20)
    by_entry: dict[str, list[run.Edit]] = {}
    for edit in run.regressions():
        by_entry.setdefault(edit.entry, []).append(edit)
    outcomes = run.run([edit for edits in by_entry.values() for edit in rng.sample(edits, 3)])
    assert all(o.good and o.large for o in outcomes), run.table(outcomes)
    assert sum(o.place == 1 for o in outcomes) >= 0.8 * len(outcomes), run.table(
        outcomes
    )  # of 18; 90% of all


@pytest.mark.slow
def test_edits_that_change_nothing_pass() -> None:
    rng = random.Random(20)
    outcomes = run.run([*run.all_at_once(), *rng.sample(run.unchanged(200), 10)])
    assert all(o.good for o in outcomes), run.table(outcomes)
