"""Check JSON against a schema: as much of JSON Schema (draft 2020-12) as ``baseline.schema.json`` uses.

``jsonschema`` would be a dependency of everyone who trains, for one file; tests hold this against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def problems(value: Any, schema: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """What the schema does not allow, as ``/entries/net/graphs: expected integer, found "1"``.

    Args:
        value: as ``json.loads`` returns it; unlike in JSON Schema, ``1.0`` is no integer.
        at: the JSON pointer (RFC 6901) of ``value``.
    """
    if (wrong := _wrong(value, schema)) is not None:
        yield f"{at or '/'}: {wrong}"
    elif isinstance(value, dict):
        known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
        yield from (
            f"{at}/{_token(key)} is missing" for key in schema.get("required", ()) if key not in value
        )
        for key, item in value.items():
            of_it = known.get(key, other)
            if of_it is False:
                yield f"{at}/{_token(key)}: no such key; valid: {', '.join(sorted(known))}"
            else:
                yield from problems(item, of_it, f"{at}/{_token(key)}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from problems(item, schema.get("items", {}), f"{at}/{i}")


def _wrong(value: Any, schema: Mapping[str, Any]) -> str | None:
    """What is wrong with a value itself, whatever is in it."""
    found = f", found {_short(value)}"
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"expected {' or '.join(kinds)}{found}"
    allowed = [schema["const"]] if "const" in schema else schema.get("enum")
    if allowed is not None and value not in allowed:
        return f"expected {' or '.join(map(_short, allowed))}{found}"
    if "anyOf" in schema:
        wrongs = [_wrong(value, part) for part in schema["anyOf"]]
        return wrongs[0] if all(wrongs) else None
    if "minimum" in schema and value < schema["minimum"]:
        return f"expected {schema['minimum']} or more{found}"
    if ("minLength" in schema or "minItems" in schema) and not value:
        return "it is empty"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return f"expected text as {schema['pattern']}{found}"
    return None


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _token(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
