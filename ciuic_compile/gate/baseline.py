"""``ciuic-baseline.json``: what was accepted, entry by entry, in a form that git diffs and merges well.

Schema ``ciuic.baseline/1`` (``baseline.schema.json``). Every row of storages, every file and every acceptance
is one line, in an order that does not depend on the plan, so that a change of one line of a model is a
change of a few lines here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final

from ciuic_compile.errors import BaselineError, OutputError
from ciuic_compile.gate.record import Fixed, Place, Record, Row
from ciuic_compile.gate.source_lines import Text
from ciuic_compile.gate.validate import problems
from ciuic_compile.writing import write_file

SCHEMA: Final = "ciuic.baseline/1"
_FAMILY: Final = "ciuic.baseline/"
_BLANK: Final = "."  # in place of a line without code
_FIGURES: Final = (
    "peak_bytes",
    "saved_bytes",
    "inductor_peak_bytes",
    "inductor_saved_bytes",
    "input_bytes",
    "time_us",
    "error",
    "graphs",
)


@dataclass(frozen=True)
class Acceptance:
    """Who looked at a change and found it right: why, when (ISO date, UTC), and what the peak was before."""

    date: str
    reason: str
    peak_bytes: int
    before_bytes: int | None = None
    torch: str = ""


@dataclass(frozen=True)
class Accepted:
    """One entry of a baseline; the newest acceptance is the last."""

    record: Record
    history: tuple[Acceptance, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """A whole baseline file."""

    entries: Mapping[str, Accepted] = field(default_factory=dict)

    def accept(self, name: str, record: Record, reason: str, date: str) -> Baseline:
        """A baseline with this entry's new record; its history grows by one acceptance."""
        old = self.entries.get(name)
        before = old.record.peak_bytes if old else None
        new = Acceptance(date, reason, record.peak_bytes, before, record.environment.get("torch", ""))
        history = (*(old.history if old else ()), new)
        return replace(self, entries={**self.entries, name: Accepted(record, history)})


def schema() -> dict[str, Any]:
    """The published JSON schema (draft 2020-12)."""
    text = resources.files("ciuic_compile.gate").joinpath("baseline.schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def load_if_there(path: Path) -> Baseline:
    """The baseline at a path; an empty one where there is no file. Raises as :func:`load`."""
    text = _text(path)
    return Baseline() if text is None else loads(text, str(path))


def load(path: Path) -> Baseline:
    """Read a baseline.

    Raises:
        BaselineError: missing, not JSON, truncated, of another version, a key twice, or against the schema.
    """
    if (text := _text(path)) is None:
        raise BaselineError(
            f"{path} does not exist: nothing has been accepted yet\n"
            "  fix: ciuic accept --all -m 'first baseline', and commit the file"
        )
    return loads(text, str(path))


def _text(path: Path) -> str | None:
    """What is in a file; None: there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BaselineError(
            f"{path} cannot be read: {error}\n  fix: restore it from version control"
        ) from error


def loads(text: str, path: str = "the baseline") -> Baseline:
    """Read a baseline's text; ``path`` is what errors call it."""
    try:
        document = json.loads(text, object_pairs_hook=_object_of, parse_constant=_no_constant)
    except _TwiceError as error:
        raise BaselineError(
            f"{path} has the key {error.key!r} twice in one object, as a merge of two branches may leave it\n"
            "  fix: remove one of the two, or restore the file from version control"
        ) from None
    except (ValueError, RecursionError) as error:
        what = "empty" if not text.strip() else "not valid JSON"
        if any(mark in text for mark in ("<<<<<<< ", ">>>>>>> ")):
            what = "left with a merge conflict in it"
        raise BaselineError(
            f"{path} is {what}, perhaps truncated: {error}\n"
            "  fix: restore it from version control, or delete it and accept again"
        ) from error
    found = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(found, str) or not found.startswith(_FAMILY):
        raise BaselineError(f"{path} is no baseline: its 'schema' is {found!r}, expected {SCHEMA!r}")
    if found != SCHEMA:
        raise BaselineError(
            f"{path} was written by another version of ciuic-compile: schema {found!r}, this version reads "
            f"{SCHEMA!r}\n  fix: install the version that wrote it, or delete it and accept again"
        )
    wrong = next(problems(document, schema()), None)
    try:
        if wrong is None:
            return Baseline({name: _accepted(entry) for name, entry in document["entries"].items()})
    except (ValueError, OverflowError) as error:  # a line or a figure that is none
        wrong = str(error)
    raise BaselineError(
        f"{path} does not follow schema {SCHEMA!r}: {wrong}\n  fix: restore it from version control"
    )


class _TwiceError(ValueError):
    """A key that is twice in one object: which of the two holds would be a guess."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(key)
        found[key] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def save(baseline: Baseline, path: Path) -> None:
    """Write a baseline, all of it or nothing.

    Raises:
        OutputError: it cannot be written; the file is as it was.
    """
    try:
        write_file(path, dumps(baseline))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; it is as it was") from error


def same(old: Record, new: Record) -> bool:
    """Whether two records would be written alike."""
    return _entry(Accepted(old)) == _entry(Accepted(new))


def dumps(baseline: Baseline) -> str:
    """The text of a baseline: equal baselines give equal text."""
    entries = [f"  {_json(name)}: {_entry(baseline.entries[name])}" for name in sorted(baseline.entries)]
    body = ",\n".join(entries)
    return f'{{\n "schema": {_json(SCHEMA)},\n "entries": {{\n{body}\n }}\n}}\n'


def _entry(accepted: Accepted) -> str:
    r = accepted.record
    lines = [
        f'"target": {_json(r.target)}',
        f'"settings": {_json(r.settings)}',
        f'"environment": {_json(r.environment)}',
    ]
    lines += [f'"{name}": {_json(_number(getattr(r, name)))}' for name in _FIGURES]
    lines += [f'"dynamic": {_json(r.dynamic)}']
    lines.append(_list("inputs", [_fixed(f) for f in r.inputs]))
    lines.append(_list("parameters", [_fixed(f) for f in r.parameters]))
    lines.append(_list("storages", [_row(row) for row in sorted(r.rows, key=lambda row: row.place)]))
    lines.append(_object("files", {name: _hashes(text) for name, text in sorted(r.files.items())}))
    lines.append(_list("history", [_acceptance(a) for a in accepted.history]))
    body = ",\n".join(f"   {line}" for line in lines)
    return f"{{\n{body}\n  }}"


def _list(name: str, items: list[dict[str, Any]]) -> str:
    body = ",\n".join(f"    {_json(item)}" for item in items)
    return f'"{name}": [\n{body}\n   ]' if items else f'"{name}": []'


def _object(name: str, items: dict[str, str]) -> str:
    body = ",\n".join(f"    {_json(key)}: {_json(value)}" for key, value in items.items())
    return f'"{name}": {{\n{body}\n   }}' if items else f'"{name}": {{}}'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _number(value: float | int) -> float | str:
    if type(value) is int:
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)


def _fixed(f: Fixed) -> dict[str, Any]:
    return {"name": f.name, "dtype": f.dtype, "shape": list(f.shape), "count": f.count, "bytes": f.nbytes}


def _row(row: Row) -> dict[str, Any]:
    p = row.place
    return {
        "id": f"{p.module}/{p.op}",
        "dtype": p.dtype,
        "shapes": [list(s) for s in row.shapes],
        "count": row.count,
        "bytes": row.nbytes,
        "saved": row.saved,
        "inductor_saved": row.inductor_saved,
        "peak": row.peak,
        "inductor_peak": row.inductor_peak,
        "returned": row.returned,
        "how": row.codecs,
        "source": f"{p.file}:{p.line}" if p.file else "",
        "code": p.code,
    }


def _acceptance(a: Acceptance) -> dict[str, Any]:
    return {
        "date": a.date, "reason": a.reason, "peak_bytes": a.peak_bytes, "before_bytes": a.before_bytes,
        "torch": a.torch,
    }  # fmt: skip


def _hashes(text: Text) -> str:
    pairs = map("".join, zip(text.hashes, text.shapes, strict=True))
    every = dict(zip(text.numbers, pairs, strict=True))
    return " ".join(every.get(i, _BLANK) for i in range(1, max(every, default=0) + 1))


def _accepted(data: dict[str, Any]) -> Accepted:
    """An entry that follows the schema; ValueError or OverflowError where a line or a figure is none."""
    figures: dict[str, Any] = {
        name: float(data[name]) if name in ("time_us", "error") else data[name] for name in _FIGURES
    }
    record = Record(
        target=data["target"],
        settings=data["settings"],
        environment=data["environment"],
        **figures,
        dynamic=data["dynamic"],
        inputs=tuple(map(_read_fixed, data["inputs"])),
        parameters=tuple(map(_read_fixed, data["parameters"])),
        rows=tuple(map(_read_row, data["storages"])),
        files={name: _read_hashes(hashes) for name, hashes in data["files"].items()},
    )
    return Accepted(record, tuple(Acceptance(**acceptance) for acceptance in data["history"]))


def _read_fixed(f: dict[str, Any]) -> Fixed:
    return Fixed(f["name"], f["dtype"], tuple(f["shape"]), f["count"], f["bytes"])


def _read_row(r: dict[str, Any]) -> Row:
    module, _, op = r["id"].rpartition("/")
    file, _, line = r["source"].rpartition(":")
    place = Place(module, op, r["dtype"], r["code"], file, int(line or 0))
    figures = {
        name: r[name] for name in ("count", "saved", "inductor_saved", "peak", "inductor_peak", "returned")
    }
    shapes = tuple(tuple(shape) for shape in r["shapes"])
    return Row(place, nbytes=r["bytes"], codecs=r["how"], shapes=shapes, **figures)


def _read_hashes(text: str) -> Text:
    found = [(i, h) for i, h in enumerate(text.split(), 1) if h != _BLANK]
    exact, shapes = tuple(h[:6] for _, h in found), tuple(h[6:] for _, h in found)
    return Text(exact, tuple(i for i, _ in found), (), shapes=shapes)
