"""Plan files: exact round trips, equal bytes for equal plans, clear words for damaged ones."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_compile.errors import PlanFileError
from ciuic_compile.report import SCHEMA, from_json, plan_schema, to_json
from ciuic_compile.types import Environment, Plan


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip_is_exact(plans: st.SearchStrategy[Plan], data: st.DataObject) -> None:
    plan = data.draw(plans)
    text = to_json(plan)
    assert text.isascii()
    assert from_json(text) == plan
    assert to_json(from_json(text)) == text
    assert from_json(text.encode()) == plan


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_plan_is_valid_by_the_published_schema(
    plans: st.SearchStrategy[Plan], data: st.DataObject
) -> None:
    validator().validate(json.loads(to_json(data.draw(plans))))


def validator() -> Any:
    """Of the schema that the package comes with."""
    jsonschema = pytest.importorskip("jsonschema", reason="a dependency of development")
    schema = json.loads(plan_schema.PATH.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_published_schema_is_that_of_the_dataclasses() -> None:
    assert json.loads(plan_schema.PATH.read_text()) == plan_schema.plan_schema(), (
        "types.py changed: run python -m ciuic_compile.report.plan_schema"
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("baseline_saved_bytes",), 1.5),
        (("decisions", 0, "action"), "melt"),
        (("decisions", 0, "storage", "shape"), "8x8"),
        (("gap",), "many"),
        (("surprise",), 1),
    ],
)
def test_the_schema_rejects_what_the_reader_rejects(plan: Plan, path: tuple[Any, ...], value: object) -> None:
    document = json.loads(to_json(plan))
    assert validator().is_valid(document)
    place = document["plan"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not validator().is_valid(document)
    with pytest.raises(PlanFileError):
        from_json(json.dumps(document))


@pytest.mark.parametrize(("field", "value"), [("first", -1), ("last", 3000), ("last", -1), ("line", 100)])
def test_blocks_outside_of_the_timeline(many: Plan, field: str, value: int) -> None:
    assert many.timeline is not None
    track = many.timeline.planned
    block = replace(track.blocks[1], **{field: value})  # type: ignore[arg-type]
    track = replace(track, blocks=(track.blocks[0], block))
    bad = replace(many, decisions=(), timeline=replace(many.timeline, planned=track))
    with pytest.raises(PlanFileError, match=r"timeline\.planned\.blocks\[1\].*3000 steps, 100 lines"):
        from_json(to_json(bad))


def test_plans_of_two_machines_differ_in_one_place(plan: Plan) -> None:
    here = Environment("0.1.0", "2.13.0", "3.6.0", "3.11.7", "Linux x86_64", "h200")
    a, b = (to_json(replace(plan, environment=e)) for e in (here, replace(here, torch="2.12.1")))
    different = [x for x, y in zip(a.splitlines(), b.splitlines(), strict=True) if x != y]
    assert len(different) == 1
    assert different[0].strip().startswith('"environment": {')


def test_ten_thousand_tensors_are_written_and_read_quickly(many: Plan) -> None:
    start = time.process_time()
    text = to_json(many)
    again = from_json(text)
    assert time.process_time() - start < 10
    assert again == many
    assert len(text) < 20e6


def test_equal_plans_give_equal_bytes(plan: Plan) -> None:
    assert replace(plan, time_us=30) == replace(plan, time_us=30.0)
    assert to_json(replace(plan, time_us=30)) == to_json(replace(plan, time_us=30.0))
    assert to_json(replace(plan, gap=-0.0)) == to_json(replace(plan, gap=0.0))


def test_layout(plan: Plan) -> None:
    document = json.loads(to_json(replace(plan, gradient_error=float("inf"))))
    assert document["schema"] == SCHEMA == "ciuic.plan/1"
    assert document["plan"]["gradient_error"] == "inf"
    assert document["plan"]["decisions"][0]["storage"]["nbytes"] == 64 * 2**20
    assert list(document["plan"]) == sorted(document["plan"])


def test_nan_is_kept(plan: Plan) -> None:
    assert str(from_json(to_json(replace(plan, gap=float("nan")))).gap) == "nan"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_truncated_anywhere(plans: st.SearchStrategy[Plan], data: st.DataObject) -> None:
    text = to_json(data.draw(plans))
    with pytest.raises(PlanFileError):
        from_json(text[: data.draw(st.integers(0, len(text) - 3))])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("{", "truncated"),
        ("[" * 100_000, "not valid JSON"),
        ("9" * 5000, "not valid JSON"),
        ("null", "no 'schema'"),
        ("[]", "no 'schema'"),
        ('{"schema": 1}', "no 'schema'"),
        ('{"schema": "ciuic.plan/2", "plan": {}}', "another version"),
        ('{"schema": "other"}', "'other'"),
        ('{"schema": "ciuic.plan/1"}', "lacks 'plan'"),
        ('{"schema": "ciuic.plan/1", "plan": []}', "plan should be an object, not []"),
        ('{"schema": "ciuic.plan/1", "plan": {}, "x": 1}', "unknown field 'x'"),
    ],
)
def test_not_a_plan(text: str | bytes, says: str) -> None:
    with pytest.raises(PlanFileError) as caught:
        from_json(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("baseline_saved_bytes",), 1.5, "plan.baseline_saved_bytes should be a whole number, not 1.5"),
        (("baseline_saved_bytes",), True, "a whole number, not true"),
        (("name",), None, "plan.name should be a string"),
        (("dynamic",), 0, "true or false"),
        (("gap",), "many", "a number"),
        (("gap",), 3, "a number"),
        (("decisions",), {}, "plan.decisions should be a list"),
        (("decisions", 3), None, "plan.decisions[3] should be an object"),
        (("decisions", 0, "action"), "melt", "'keep', 'recompute', 'compress'"),
        (("decisions", 0, "action"), [], "plan.decisions[0].action"),
        (("decisions", 1, "storage", "shape", 0), "8", "plan.decisions[1].storage.shape[0]"),
        (("decisions", 1, "storage", "source", "line"), None, "source.line should be a whole number"),
        (("notes", 0), 7, "plan.notes[0] should be a string"),
        (("surprise",), 7, "unknown field 'surprise'"),
    ],
)
def test_wrong_types(plan: Plan, path: tuple[Any, ...], value: object, says: str) -> None:
    document = json.loads(to_json(plan))
    place = document["plan"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PlanFileError) as caught:
        from_json(json.dumps(document))
    assert says in str(caught.value)


def test_missing_field(plan: Plan) -> None:
    document = json.loads(to_json(plan))
    del document["plan"]["decisions"][2]["storage"]["dtype"]
    with pytest.raises(PlanFileError, match=r"decisions\[2\]\.storage lacks 'dtype'"):
        from_json(json.dumps(document))


def test_values_that_python_calls_numbers_but_json_does_not(plan: Plan) -> None:
    text = to_json(plan).replace('"gap": 0.0', '"gap": Infinity')
    with pytest.raises(PlanFileError, match=r"plan\.gap"):
        from_json(text)
