"""Plans as JSON, schema ``ciuic.plan/1``: equal plans give the same bytes; reading gives an equal plan.

``schema/plan-1.json`` describes the file to other programs. It is made from the dataclasses:
``python -m ciuic_compile.report.plan_schema``, after a change of :mod:`ciuic_compile.types`.
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, Final

from ciuic_compile.errors import PlanFileError
from ciuic_compile.types import Plan, Timeline

SCHEMA: Final = "ciuic.plan/1"
_FAMILY: Final = "ciuic.plan/"
_NON_FINITE: Final = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_json(plan: Plan) -> str:
    """Return the plan as ASCII JSON with sorted keys, ended by a newline; bytes are whole numbers.

    Floats that JSON cannot hold are the strings ``"inf"``, ``"-inf"`` and ``"nan"``.
    """
    lines: list[str] = []
    _write({"schema": SCHEMA, "plan": _dump(plan, Plan)}, "", "", lines)
    return "\n".join(lines) + "\n"


def from_json(text: str | bytes) -> Plan:
    """Return the plan that :func:`to_json` wrote.

    Raises:
        PlanFileError: not JSON, truncated, another schema or version; a field missing, unknown or mistyped.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "empty" if not text.strip() else "not valid JSON, perhaps truncated"
        raise PlanFileError(
            f"plan file is {what}: {error}; write it again with report='plan.json'"
        ) from error
    if not isinstance(document, dict) or not isinstance(document.get("schema"), str):
        raise PlanFileError(f"not a plan file: no 'schema' field; expected {SCHEMA!r} at the top level")
    schema = document["schema"]
    if schema != SCHEMA:
        newer = "written by another version of ciuic-compile: " if schema.startswith(_FAMILY) else ""
        raise PlanFileError(
            f"{newer}schema {schema!r}, and this version reads {SCHEMA!r}; write the plan again"
        )
    _check_keys(document, {"schema", "plan"}, "the file")
    plan = _load(document["plan"], Plan, "plan")
    assert isinstance(plan, Plan)
    if plan.timeline is not None:
        _check_timeline(plan.timeline)
    return plan


def _check_timeline(timeline: Timeline) -> None:
    for name, track in (("baseline", timeline.baseline), ("planned", timeline.planned)):
        steps = len(track.steps)
        for i, block in enumerate(track.blocks):
            known = block.line is None or 0 <= block.line < len(timeline.lines)
            if not (known and 0 <= block.first <= block.last < steps):
                raise PlanFileError(
                    f"plan file: plan.timeline.{name}.blocks[{i}] is alive at a step, or points at a line, "
                    f"that there is not ({steps} steps, {len(timeline.lines)} lines); write the plan again"
                )


def _write(data: Any, head: str, indent: str, lines: list[str]) -> None:
    """``data`` in lines that ``diff`` can follow: an object takes one unless there are objects in it."""
    if _is_flat(data):
        text = _compact(data)
        if not isinstance(data, list) or len(text) <= 100:
            lines.append(f"{indent}{head}{text}")
            return
    brackets = "{}" if isinstance(data, dict) else "[]"
    lines.append(f"{indent}{head}{brackets[0]}")
    pairs = sorted(data.items()) if isinstance(data, dict) else [("", item) for item in data]
    for key, item in pairs:
        _write(item, f"{_compact(key)}: " if isinstance(data, dict) else "", indent + " ", lines)
        lines[-1] += ","
    lines[-1] = lines[-1].removesuffix(",")
    lines.append(f"{indent}{brackets[1]}")


def _is_flat(data: Any) -> bool:
    if isinstance(data, dict):
        return all(not isinstance(item, dict) and _is_flat(item) for item in data.values())
    return not isinstance(data, list) or not any(isinstance(item, (dict, list)) for item in data)


def _compact(data: Any) -> str:
    return json.dumps(data, sort_keys=True, ensure_ascii=True, allow_nan=False)


def _dump(value: Any, kind: Any) -> Any:
    """``value`` as JSON data of the declared type, so that 1, 1.0 and numpy's 1 are written alike."""
    if is_dataclass(kind) and isinstance(kind, type):
        return {name: _dump(getattr(value, name), hint) for name, hint in _hints(kind).items()}
    if typing.get_origin(kind) is tuple:
        return [_dump(item, typing.get_args(kind)[0]) for item in value]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if value is None else _dump(value, _inner(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value).value
    if kind is float:
        number = float(value) + 0.0  # -0.0 equals 0.0, so it is written alike
        return number if math.isfinite(number) else str(number)
    return kind(value)


def _load(data: Any, kind: Any, at: str) -> Any:
    """The inverse of ``_dump``; ``at`` says in an error where in the file it is."""
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(data, dict):
            raise _mistyped(at, "an object", data)
        hints = _hints(kind)
        _check_keys(data, set(hints), at)
        return kind(**{name: _load(data[name], hint, f"{at}.{name}") for name, hint in hints.items()})
    if typing.get_origin(kind) is tuple:
        if not isinstance(data, list):
            raise _mistyped(at, "a list", data)
        return tuple(_load(item, typing.get_args(kind)[0], f"{at}[{i}]") for i, item in enumerate(data))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return None if data is None else _load(data, _inner(kind), at)
    if isinstance(kind, type) and issubclass(kind, Enum):
        if isinstance(data, str) and data in {member.value for member in kind}:
            return kind(data)
        raise _mistyped(at, f"one of {', '.join(repr(member.value) for member in kind)}", data)
    if kind is float:
        if isinstance(data, str) and data in _NON_FINITE:
            return _NON_FINITE[data]
        if isinstance(data, float) and math.isfinite(data):
            return data
        raise _mistyped(at, "a number with a decimal point, or 'inf', '-inf', 'nan'", data)
    if type(data) is not kind:
        words = {int: "a whole number", str: "a string", bool: "true or false"}
        raise _mistyped(at, words.get(kind, str(kind)), data)
    return data


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Field names and types of a dataclass without inherited or class variables."""
    return typing.get_type_hints(kind)


def _inner(kind: Any) -> Any:
    """``T`` of ``T | None``."""
    return next(part for part in typing.get_args(kind) if part is not types.NoneType)


def _check_keys(data: dict[str, Any], expected: set[str], at: str) -> None:
    missing, unknown = sorted(expected - set(data)), sorted(set(data) - expected)
    if missing:
        raise PlanFileError(f"plan file: {at} lacks {missing[0]!r}; write the plan again")
    if unknown:
        raise PlanFileError(f"plan file: {at} has an unknown field {unknown[0]!r}; write the plan again")


def _mistyped(at: str, expected: str, data: Any) -> PlanFileError:
    shown = json.dumps(data)
    return PlanFileError(f"plan file: {at} should be {expected}, not {shown[:80]}{'...' * (len(shown) > 80)}")
