"""The JSON Schema (draft 2020-12) of plan files, made from the dataclasses that they hold.

``python -m ciuic_compile.report.plan_schema`` writes ``schema/plan-1.json`` again.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, Final

from ciuic_compile.report.plan_json import SCHEMA
from ciuic_compile.types import Plan

PATH: Final = Path(__file__).parent / "schema" / "plan-1.json"
_NUMBER: Final = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}


def plan_schema() -> dict[str, Any]:
    """The schema of what :func:`~ciuic_compile.report.to_json` writes."""
    definitions: dict[str, Any] = {}
    plan = _schema(Plan, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:ciuic-compile:ciuic.plan:1",
        "title": "A plan of ciuic-compile",
        "description": "Bytes are whole numbers, times microseconds, errors fractions: docs/plan-report.md.",
        "type": "object",
        "properties": {"schema": {"const": SCHEMA}, "plan": plan},
        "required": ["schema", "plan"],
        "additionalProperties": False,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Of values of a declared type; ``definitions`` gets what is referred to."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(part, definitions) for part in arguments]}
    if isinstance(kind, type) and (issubclass(kind, Enum) or dataclasses.is_dataclass(kind)):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # so that a type may hold itself
            made = _enum(kind) if issubclass(kind, Enum) else _object(kind, definitions)
            definitions[kind.__name__] = made
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if kind is float:
        return dict(_NUMBER)
    return {"type": {int: "integer", str: "string", bool: "boolean", types.NoneType: "null"}[kind]}


def _enum(kind: type[Enum]) -> dict[str, Any]:
    return {"description": _first_line(kind), "enum": [member.value for member in kind]}


def _object(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    words = _described(kind)
    properties = {}
    for name, hint in typing.get_type_hints(kind).items():
        properties[name] = _schema(hint, definitions)
        if name in words:
            properties[name]["description"] = words[name]
    return {
        "description": _first_line(kind),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n", 1)[0]


def _described(kind: type) -> dict[str, str]:
    """What the docstring's "Attributes" and the comments beside the fields say of each."""
    found = re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(kind), re.MULTILINE)
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+): ((?:.|\n {6,})+)", text, re.MULTILINE)
    return {name: " ".join(words.replace("``", "").split()) for name, words in (*found, *entries)}


def main() -> None:
    """Write the schema beside this module."""
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(json.dumps(plan_schema(), indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
