"""Verdicts and culprits, on records made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ciuic_compile.gate.baseline import Accepted
from ciuic_compile.gate.compare import Check, Status, check, exit_code
from ciuic_compile.gate.culprits import common_factor, find, summary
from ciuic_compile.gate.record import Fixed, Record
from ciuic_compile.gate.settings import Allowance, Entry, Limits
from ciuic_compile.gate.source_lines import changes, parse
from tests.gate.records import CODE, make_record, row, rows

ENTRY = Entry("net", "model.py:make", {"mode": "4:1"}, "h200", limits=Limits(min_abs=0), line=6)
BEFORE = make_record()


def judged(now: Record, entry: Entry = ENTRY, before: Record | None = BEFORE, **more: Any) -> Check:
    return check(entry, now, None if before is None else Accepted(before), **more)


def edited(line: int, text: str) -> tuple[str, ...]:
    return (*CODE[: line - 1], text, *CODE[line:])


# ---------------------------------------------------------------- verdicts


def test_the_same_passes() -> None:
    assert judged(BEFORE).status is Status.PASS


@pytest.mark.parametrize(
    ("peak", "limits", "status"),
    [
        (4096 + 40, Limits(min_abs=0), Status.PASS),
        (4096 + 41, Limits(min_abs=0), Status.REGRESSION),
        (4096 + 41, Limits(min_abs=41), Status.PASS),
        (4096 + 42, Limits(min_abs=41), Status.REGRESSION),
        (4096 + 11, Limits(Allowance(0.5, 10), 0), Status.REGRESSION),
        (4096 - 41, Limits(min_abs=0), Status.IMPROVED),
        (4096, Limits(hard_limit=4096 + 511), Status.REGRESSION),
        (4096, Limits(hard_limit=4096 + 512), Status.PASS),
    ],
)
def test_the_peak_has_limits(peak: int, limits: Limits, status: Status) -> None:
    found = judged(replace(BEFORE, peak_bytes=peak), replace(ENTRY, limits=limits))
    assert found.status is status
    assert ("ciuic accept net -m" in found.fix) == (status is not Status.PASS and limits.hard_limit is None)


@pytest.mark.parametrize(
    ("change", "limits", "word"),
    [
        ({"input_bytes": 1024}, Limits(min_abs=0), "parameters and inputs"),
        ({"time_us": 12.0}, Limits(max_time_increase=Allowance(0.1)), "time"),
        ({"error": 0.06}, Limits(max_error=0.05), "gradient error"),
        ({"graphs": 2}, Limits(), "compiled graphs"),
    ],
)
def test_other_figures_have_limits(change: dict[str, Any], limits: Limits, word: str) -> None:
    found = judged(replace(BEFORE, **change), replace(ENTRY, limits=limits))
    assert found.status is Status.REGRESSION and word in found.title
    assert judged(BEFORE, replace(ENTRY, limits=limits)).status is Status.PASS


def test_without_a_baseline() -> None:
    missing = judged(BEFORE, before=None)
    assert (missing.status, missing.exit_code) == (Status.MISSING, 3) and "ciuic accept net" in missing.fix
    over = judged(BEFORE, replace(ENTRY, limits=Limits(hard_limit=1)), before=None)
    assert (over.status, over.exit_code) == (Status.REGRESSION, 1)


def test_a_baseline_of_something_else() -> None:
    other = replace(BEFORE, target="b.py:make")
    assert judged(other).status is Status.INCOMPATIBLE and "another target" in judged(other).title
    device = replace(BEFORE, settings={**BEFORE.settings, "device": "a100-80"})
    assert judged(device).status is Status.INCOMPATIBLE and "another device" in judged(device).title
    text = ("class Vit:", "    y = conv(x)")
    vit = make_record(text, (row(text[1], 2),), parameters=(Fixed("conv.weight", "float32", (3, 3), 1, 36),))
    assert judged(vit).status is Status.INCOMPATIBLE and "another model" in judged(vit).title


def test_every_shape_may_change_and_it_is_the_same_model() -> None:
    wide = tuple(replace(f, shape=(99, 99), nbytes=9999) for f in BEFORE.parameters)
    assert judged(replace(BEFORE, parameters=wide)).status is Status.PASS


def test_another_torch_is_told_apart_from_a_change_of_code() -> None:
    newer = replace(BEFORE, peak_bytes=9999, environment={**BEFORE.environment, "torch": "2.14.0"})
    found = judged(newer)
    assert (found.status, found.exit_code) == (Status.ENVIRONMENT, 3)
    assert "torch 2.13.0 -> 2.14.0; no line of your code did (model.py)" in found.details[0]
    assert not found.culprits and "torch 2.13.0 -> 2.14.0" in found.fix
    assert judged(newer, environment="warn").exit_code == 0
    both = judged(replace(newer, files={"model.py": parse("x = 1\n")}))
    assert both.status is Status.REGRESSION and "your code as well" in both.details[0]
    holds = judged(replace(newer, peak_bytes=BEFORE.peak_bytes))
    assert holds.status is Status.PASS and "the figures hold" in holds.details[0]


def test_another_torch_is_no_excuse_for_a_limit_that_is_not_relative() -> None:
    newer = replace(BEFORE, peak_bytes=9999, environment={**BEFORE.environment, "torch": "2.14.0"})
    for environment in ("warn", "fail"):
        found = judged(newer, replace(ENTRY, limits=Limits(hard_limit=1)), environment=environment)
        assert (found.status, found.exit_code) == (Status.REGRESSION, 1)
        assert not any("your code as well" in line for line in found.details)


def test_python_and_the_builds_of_torch_are_no_other_environment() -> None:
    assert judged(replace(BEFORE, environment={**BEFORE.environment, "python": "3.12"})).details == ()


def test_changed_settings_are_the_first_culprit() -> None:
    options = {**BEFORE.settings, "options": {"mode": "lossless"}}
    found = judged(replace(BEFORE, peak_bytes=9999, settings=options))
    assert (found.culprits[0].file, found.culprits[0].line) == ("ciuic.toml", 6)
    assert "mode '4:1' -> 'lossless'" in found.details[0]


def test_the_exit_status_is_that_of_what_comes_first() -> None:
    def of(*statuses: Status) -> int:
        return exit_code([Check("x", status, "") for status in statuses])

    assert of(Status.PASS, Status.IMPROVED) == 0
    assert of(Status.MISSING, Status.REGRESSION) == 1
    assert of(Status.REGRESSION, Status.INFEASIBLE) == 4
    assert of(Status.INFEASIBLE, Status.ERROR) == 2


# ---------------------------------------------------------------- culprits


def test_a_changed_line_that_grew_is_first() -> None:
    lines = edited(4, "        h = gelu(h) * sigmoid(h)")
    grown = (*rows((1024, 0, 1024)), row(lines[3], 4, "blocks.*", nbytes=6000))
    first = find(BEFORE, make_record(lines, grown))[0]
    assert (first.where, first.code) == ("model.py:4", lines[3].strip())
    assert first.nbytes == 6000 - 2048 and first.changed and "changed since the baseline" in first.why


def test_a_changed_line_that_makes_nothing_is_first_where_its_class_grew() -> None:
    lines = edited(2, "    def forward(self, x, widen=2):")
    found = find(BEFORE, make_record(lines, rows((2048, 4096, 2048))))
    assert [c.line for c in found] == [2, 4, 3, 5]


def test_a_changed_line_elsewhere_is_first_where_nothing_else_changed() -> None:
    lines = edited(8, "    batch = 16")
    inputs = (Fixed("0", "float32", (16, 4), 1, 256),)
    now = make_record(lines, rows((2048, 4096, 2048)), inputs=inputs)
    assert find(BEFORE, now)[0].line == 8
    said = summary(BEFORE, now)
    assert "float32[8,4] -> 0 float32[16,4]" in said[0] and "the same factor, 2" in said[1]


def test_lines_that_moved_are_matched() -> None:
    lines = ("import os", "", *CODE)
    found = find(BEFORE, make_record(lines, rows((1024, 4096, 1024), first=5)))
    assert [(c.line, c.nbytes, c.changed) for c in found if c.nbytes] == [(6, 2048, False)]


def test_without_source_files_growth_alone_decides() -> None:
    before, now = (make_record(made=made, files={}) for made in (rows(), rows((1024, 4096, 1025))))
    assert [(c.line, c.nbytes) for c in find(before, now)] == [(4, 2048), (5, 1)]


def test_a_cast_comes_before_what_it_widened() -> None:
    before = make_record(files={})
    wider = tuple(
        replace(r, place=replace(r.place, dtype="float32"), nbytes=2 * r.nbytes, peak=2 * r.peak)
        for r in rows((1024, 2048, 4096))
    )
    first = find(before, make_record(made=wider, files={}))[0]
    assert first.line == 3 and "dtype bfloat16 -> float32" in first.why


def test_a_lost_checkpoint_is_named() -> None:
    recomputed = tuple(replace(r, inductor_saved=0, saved=0, peak=0, inductor_peak=0) for r in rows())
    found = find(make_record(made=recomputed), BEFORE)
    assert any("was recomputed before" in why for why in found[0].why)


def test_a_lost_codec_is_named() -> None:
    packed = tuple(replace(r, saved=256, peak=256, codecs="int8_group64 x2") for r in rows())
    found = find(make_record(made=packed), BEFORE)
    assert "stored as keep x2, before as int8_group64 x2" in found[0].why


def test_removed_lines_are_told() -> None:
    lines = (*CODE[:3], *CODE[4:])
    found = find(BEFORE, make_record(lines, (rows()[0], row(CODE[4], 4, "blocks.*", nbytes=9000))))
    assert found[0].line == 4 and "lines were removed above it" in found[0].why


def test_a_new_parameter_is_told() -> None:
    more = Fixed("head.weight", "float32", (50, 8), 1, 50 * 8 * 4)
    said = summary(BEFORE, replace(BEFORE, parameters=(*BEFORE.parameters, more)))
    assert said == ["parameter head.weight float32[50,8]: 1.56 KiB more, and as much for its gradient"]


def test_no_common_factor_where_there_is_none() -> None:
    assert common_factor(BEFORE, make_record(made=rows((1024, 4096, 1024)))) is None
    assert common_factor(BEFORE, BEFORE) is None


def test_comments_blank_lines_and_indentation_are_no_changes() -> None:
    old = parse("a = 1\nif a:\n  b = 2\n")
    new = parse("# what\n\na = 1  # one\nif a:\n\n      b = 2\n")
    found = changes(old, new)
    assert not found.changed and found.moved == {1: 3, 2: 4, 3: 6}


def test_a_file_that_is_no_python_is_compared_line_by_line() -> None:
    old, new = parse('{"layers": 2,\n "d": (\n'), parse('{"layers": 3,\n "d": (\n')
    assert changes(old, new).changed == {1}


def test_a_renamed_file_is_still_known() -> None:
    grown = tuple(replace(r, place=replace(r.place, file="net.py")) for r in rows((1024, 4096, 1024)))
    now = replace(make_record(made=grown), files={"net.py": BEFORE.files["model.py"]})
    assert [(c.where, c.nbytes) for c in find(BEFORE, now)] == [("net.py:4", 2048)]
