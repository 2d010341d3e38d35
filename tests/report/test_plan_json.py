"""Plan files: exact round trips, equal bytes for equal plans, clear words for damaged ones."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_compile.errors import PlanFileError
from ciuic_compile.report import SCHEMA, from_json, to_json
from ciuic_compile.types import Plan


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip_is_exact(plans: st.SearchStrategy[Plan], data: st.DataObject) -> None:
    plan = data.draw(plans)
    text = to_json(plan)
    assert text.isascii()
    assert from_json(text) == plan
    assert to_json(from_json(text)) == text
    assert from_json(text.encode()) == plan


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
