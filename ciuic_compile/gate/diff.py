"""Compares two plans, baselines or targets, whatever each of them is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ciuic_compile.config import parse_options
from ciuic_compile.errors import BaselineError, PlanFileError, nearest
from ciuic_compile.gate import baseline
from ciuic_compile.gate.compare import Check, Status, measure
from ciuic_compile.gate.culprits import find, summary
from ciuic_compile.gate.plan_entry import plan_entry
from ciuic_compile.gate.record import Record, record
from ciuic_compile.gate.settings import Entry
from ciuic_compile.report import from_json


def compare(
    a: str, b: str, options: Mapping[str, Any] | None = None, device: str | None = None
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """What differs, entry by entry, and sentences on what could not be compared.

    Args:
        a: a plan's JSON file, a baseline file, or a target (docs/cli.md); it is the older one.
        b: likewise.
        options: that targets are planned with.
        device: that targets are planned for; None: as the other side's baseline was.

    Raises:
        PlanFileError: a file that is neither plan nor baseline.
        BaselineError: a baseline that cannot be read, or has no entry for the target.
        TargetError: a target that cannot be planned.
    """
    parse_options({**(options or {}), **({"device": device} if device else {})})  # before anything is planned
    old, new = _read(a), _read(b)
    old = old if old is not None else _planned(a, new, options, device)
    new = new if new is not None else _planned(b, old, options, device)
    if len(old) == len(new) == 1:  # two plans need not have one name
        (name, before), (other, now) = next(iter(old.items())), next(iter(new.items()))
        return (_difference(name if name == other else f"{name} -> {other}", before, now),), ()
    both = [name for name in old if name in new]
    if not both:
        raise BaselineError(f"{a} and {b} have no entry in common: {', '.join(old)} and {', '.join(new)}")
    notes = [f"{name} is only in {a}" for name in old if name not in new]
    notes += [f"{name} is only in {b}" for name in new if name not in old]
    return tuple(_difference(name, old[name], new[name]) for name in both), tuple(notes)


def _difference(name: str, before: Record, now: Record) -> Check:
    measures = measure(now, before)
    grew = now.total_bytes > before.total_bytes or now.inductor_peak_bytes > before.inductor_peak_bytes
    return Check(
        name,
        Status.PASS,
        f"peak {measures[0].words}",
        tuple(m for m in measures),
        tuple(summary(before, now)),
        find(before, now) if grew else (),
    )


def _read(name: str) -> dict[str, Record] | None:
    """The records in a file by name; None where it is no file, but a target."""
    path = Path(name)
    if path.suffix != ".json" or path.name == "config.json":
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanFileError(f"{name} cannot be read: {error}\n  fix: correct the path") from error
    if _schema(text).startswith("ciuic.baseline/"):
        return {key: accepted.record for key, accepted in baseline.loads(text, name).entries.items()}
    try:
        plan = from_json(text)
    except PlanFileError as error:
        raise PlanFileError(f"{name}: {error}") from error
    return {
        path.stem: record([plan], Entry(path.stem, plan.name, {"mode": plan.mode}, plan.device), files=False)
    }


def _schema(text: str) -> str:
    try:
        found = json.loads(text).get("schema")
    except (ValueError, AttributeError, RecursionError):
        return "ciuic.baseline/" if '"ciuic.baseline/' in text[:200] else ""
    return str(found)


def _planned(
    target: str, other: Mapping[str, Record] | None, options: Mapping[str, Any] | None, device: str | None
) -> dict[str, Record]:
    """The record of a target, planned as the other side's entry for it was, but for what is asked for."""
    same = {name: r for name, r in (other or {}).items() if r.target == target}
    if other and len(other) > 1 and not same:
        targets = {r.target for r in other.values()}
        raise BaselineError(
            f"no entry of the baseline is of target {target!r}{nearest(target, targets)}\n"
            f"  valid: {', '.join(sorted(targets))}"
        )
    entries = same or {target: next(iter(other.values()))} if other else {target: None}
    planned = {}
    for name, reference in entries.items():
        settings: Mapping[str, Any] = reference.settings if reference is not None else {}
        shape = {k: v for k, v in settings.items() if k not in ("device", "autocast", "dynamic", "options")}
        entry = Entry(
            name,
            target,
            {**settings.get("options", {}), **(options or {})},
            device or settings.get("device"),
            settings.get("autocast"),
            dynamic=bool(settings.get("dynamic")),
            shape=shape if reference is not None and reference.target == target else {},
        )
        planned[name] = plan_entry(entry)
    return planned
