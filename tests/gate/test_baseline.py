"""The baseline file: what is written is read, small changes are small diffs, broken files are told."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ciuic_compile.errors import BaselineError, OutputError
from ciuic_compile.gate import baseline
from ciuic_compile.gate.baseline import Baseline, dumps, load, loads, save
from ciuic_compile.gate.source_lines import parse
from ciuic_compile.gate.validate import problems
from tests.gate.records import CODE, make_record, row


def one() -> Baseline:
    return Baseline().accept("net", make_record(), "first", "2026-01-02")


def test_what_is_written_is_read() -> None:
    text = dumps(one())
    assert dumps(loads(text)) == text
    read = loads(text).entries["net"].record
    assert baseline.same(read, make_record())
    assert read.files["model.py"].hashes == make_record().files["model.py"].hashes
    assert read.files["model.py"].numbers == make_record().files["model.py"].numbers


def test_it_follows_its_published_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(dumps(one()))
    validator = jsonschema.Draft202012Validator(baseline.schema())
    validator.check_schema(baseline.schema())
    validator.validate(document)
    document["entries"]["net"]["storages"][0]["peak"] = 1.5
    assert not validator.is_valid(document)


def test_the_order_of_rows_is_not_the_plans() -> None:
    record = make_record()
    assert dumps(one()) == dumps(
        Baseline().accept("net", replace(record, rows=record.rows[::-1]), "first", "2026-01-02")
    )


def test_one_grown_row_is_a_diff_of_a_few_lines() -> None:
    record = make_record()
    grown = replace(
        record, peak_bytes=record.peak_bytes + 8, rows=(replace(record.rows[0], peak=99), *record.rows[1:])
    )
    changed = [
        line
        for line in difflib.ndiff(
            dumps(one()).splitlines(), dumps(one().accept("net", grown, "why", "2026-01-03")).splitlines()
        )
        if line[0] in "+-"
    ]
    assert len(changed) == 7  # peak and row, before and after; the history: a comma, a line


def test_entries_of_two_branches_merge_line_by_line() -> None:
    left = one().accept("left", make_record(), "l", "2026-01-03")
    assert (
        dumps(one()).splitlines()[3:-3]
        == dumps(left).splitlines()[len(dumps(left).splitlines()) - len(dumps(one()).splitlines()) + 3 : -3]
    )


def test_acceptances_are_kept_with_their_reasons() -> None:
    grown = replace(make_record(), peak_bytes=make_record().peak_bytes + 8)
    history = loads(dumps(one().accept("net", grown, "longer context", "2026-02-03"))).entries["net"].history
    assert [(a.reason, a.date) for a in history] == [
        ("first", "2026-01-02"),
        ("longer context", "2026-02-03"),
    ]
    assert (history[1].before_bytes, history[1].peak_bytes) == (make_record().peak_bytes, grown.peak_bytes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (dumps(one())[:300], "truncated"),
        ("<<<<<<< ours\n" + dumps(one()), "merge conflict"),
        ("[]", "is no baseline"),
        ('{"schema": "ciuic.plan/1"}', "is no baseline"),
        (dumps(one()).replace("baseline/1", "baseline/2"), "another version"),
        (dumps(one()).replace('"peak_bytes": 4096,', '"peak_bytes": "4096",'), "does not follow"),
        (dumps(one()).replace('"storages"', '"storage"'), "does not follow"),
        (dumps(one()).replace('"source": "model.py:', '"source": "model.py:x'), "does not follow"),
        (dumps(one()).replace('{"mode": "4:1"}', '"4:1"'), "/entries/net/settings/options: expected object"),
        (
            dumps(one()).replace('"count": 1', '"count": "1"', 1),
            "/inputs/0/count: expected integer, found '1'",
        ),
        (
            dumps(one()).replace('"shape": [8, 4]', '"shape": 8', 1),
            "/inputs/0/shape: expected array, found 8",
        ),
        (dumps(one()).replace('"shape": [8, 4]', '"shape": ["8"]', 1), "/inputs/0/shape/0: expected integer"),
        (dumps(one()).replace('"shapes": [[', '"shapes": [["8"],[', 1), "/storages/0/shapes/0/0: expected"),
        (dumps(one()).replace('"time_us": 10.0', '"time_us": NaN'), "NaN is no JSON"),
        (dumps(one()).replace('"time_us": 10.0', f'"time_us": 1{"0" * 400}'), "does not follow"),
        (dumps(one()).replace('"graphs": 1', '"graphs": true'), "/entries/net/graphs: expected integer"),
        (dumps(one()).replace('"graphs": 1', '"graphs": 1, "graphs": 1'), "the key 'graphs' twice"),
        (dumps(one()).replace('"net": {', '"net": {}, "net": {'), "the key 'net' twice"),
        (dumps(one()).replace('{"mode": "4:1"}', '{"mode": "4:1", "mode": "2:1"}'), "the key 'mode' twice"),
    ],
)
def test_a_broken_file_is_told(text: str, words: str) -> None:
    with pytest.raises(BaselineError, match=words):
        loads(text, "b.json")


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="ciuic accept --all"):
        load(tmp_path / "b.json")


def test_a_file_that_cannot_be_written_stays(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        save(one(), tmp_path / "missing" / "b.json")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_lacks(tmp_path: Path) -> None:
    odd = replace(make_record(), error=float("inf"), time_us=float("nan"))
    save(Baseline().accept("net", odd, "x", "2026-01-02"), tmp_path / "b.json")
    assert load(tmp_path / "b.json").entries["net"].record.error == float("inf")


def test_a_row_keeps_its_place() -> None:
    made = row(CODE[2], 3, "blocks.*", nbytes=5)
    read = loads(dumps(Baseline().accept("n", replace(make_record(), rows=(made,)), "x", "2026-01-02")))
    assert read.entries["n"].record.rows == (made,)


def mutations(value: Any) -> Iterator[Any]:
    """The document with one thing in it missing, added or replaced, for every thing."""
    yield from ("x", "", -1, 1.5, True, None, [], {}, [3], {"x": 1})
    if isinstance(value, dict):
        yield {**value, "another": 1}
        for key, item in value.items():
            yield {k: v for k, v in value.items() if k != key}
            yield from ({**value, key: other} for other in mutations(item))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from ([*value[:i], other, *value[i + 1 :]] for other in mutations(item))


def test_what_is_read_is_what_the_published_schema_allows() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    small = replace(
        make_record(), rows=make_record().rows[:1], parameters=(), files={"a.py": parse("a = 1\n")}
    )
    document = json.loads(dumps(Baseline().accept("net", small, "first", "2026-01-02")))
    validator = jsonschema.Draft202012Validator(baseline.schema())
    told = [(next(problems(m, baseline.schema()), ""), validator.is_valid(m)) for m in mutations(document)]
    assert len(told) > 500 and {bool(wrong) for wrong, _ in told} == {True, False}
    assert [wrong for wrong, valid in told if bool(wrong) == valid] == []


def test_every_word_of_the_schema_is_understood() -> None:
    def words(schema: Any) -> Iterator[str]:
        yield from schema
        of_them = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
        of_them += [v for k in ("items", "additionalProperties") if isinstance(v := schema.get(k), dict)]
        for part in of_them:
            yield from words(part)

    assert set(words(baseline.schema())) - {"$schema", "$id", "title", "description"} == {
        "type", "const", "enum", "anyOf", "properties", "required", "additionalProperties", "items",
        "minItems", "minLength", "minimum", "pattern",
    }  # fmt: skip
    texts = json.dumps(baseline.schema())
    assert set(re.findall(r'"min(?:Items|Length)": (\d+)', texts)) == {"1"}  # which is: not empty
