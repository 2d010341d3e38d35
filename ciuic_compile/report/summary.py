"""A plan condensed to what a reader asks first; text and HTML are drawn from this."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ciuic_compile.report._format import codec_bits, codec_label, short_file, star
from ciuic_compile.types import Action, Decision, Plan, TensorClass

KEPT, RECOMPUTED = "kept", "recomputed"


@dataclass(frozen=True)
class Row:
    """Storages that share an action.

    Attributes:
        label: ``kept``, ``recomputed``, or a codec's payload such as ``INT4``.
        count: storages.
        nbytes: their full size, bytes.
        baseline_bytes: what Inductor's own partition saves of them, bytes.
        saved_bytes: what the plan saves of them, bytes.
    """

    label: str
    count: int
    nbytes: int
    baseline_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class Group:
    """Storages made by the same line of identical layers and treated alike; sizes in bytes, summed."""

    label: str
    count: int
    nbytes: int
    baseline_bytes: int
    saved_bytes: int
    op: str
    module: str
    where: str
    code: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """What both renderings show.

    Attributes:
        rows: one an action, largest saved bytes of the codecs last; storages that count only.
        uncounted: storages of inputs, parameters and outputs, which the plan's byte counts leave out.
        changed: compressed and recomputed groups, largest full size first.
        kept: kept groups, largest first.
    """

    rows: tuple[Row, ...]
    uncounted: Row
    changed: tuple[Group, ...]
    kept: tuple[Group, ...]


def action_label(decision: Decision) -> str:
    """The word that a row is headed by."""
    if decision.action is Action.COMPRESS:
        return codec_label(decision.codec)
    return KEPT if decision.action is Action.KEEP else RECOMPUTED


def summarize(plan: Plan) -> Summary:
    """Count and group a plan's decisions."""
    counted = [d for d in plan.decisions if d.storage.kind is not TensorClass.INPUT]
    uncounted = [d for d in plan.decisions if d.storage.kind is TensorClass.INPUT]
    labels = {action_label(d) for d in counted}
    order = [KEPT, RECOMPUTED]
    order += sorted(labels - set(order), key=lambda label: (-codec_bits(label), label))
    rows = [_row(label, [d for d in counted if action_label(d) == label]) for label in order]
    groups = _groups(counted)
    return Summary(
        rows=tuple(rows),
        uncounted=_row("not counted", uncounted),
        changed=tuple(g for g in groups if g.label != KEPT and (g.baseline_bytes or g.saved_bytes)),
        kept=tuple(g for g in groups if g.label == KEPT and g.saved_bytes),
    )


def merge_rows(label: str, rows: Iterable[Row]) -> Row:
    """Add rows up under one label."""
    some = tuple(rows)
    return Row(
        label,
        sum(r.count for r in some),
        sum(r.nbytes for r in some),
        sum(r.baseline_bytes for r in some),
        sum(r.saved_bytes for r in some),
    )


def reason_of(decision: Decision) -> str:
    """Why the decision is what it is, in the planner's words."""
    return decision.reason or decision.storage.kept_because or "no reason recorded"


def _row(label: str, some: list[Decision]) -> Row:
    return Row(
        label,
        len(some),
        sum(d.storage.nbytes for d in some),
        sum(d.baseline_bytes for d in some),
        sum(d.saved_bytes for d in some),
    )


def _groups(decisions: list[Decision]) -> list[Group]:
    members: dict[tuple[str, ...], list[Decision]] = {}
    for d in decisions:
        source = d.storage.source
        why = reason_of(d) if d.action is Action.KEEP else ""
        key = (action_label(d), d.storage.op, star(source.module), source.file, str(source.line), why)
        members.setdefault(key, []).append(d)
    groups = [_group(some) for some in members.values()]
    return sorted(groups, key=lambda g: (-g.nbytes, g.label, g.module, g.where, g.op, g.reason))


def _group(some: list[Decision]) -> Group:
    first = some[0].storage.source
    modules = {d.storage.source.module for d in some}
    row = _row(action_label(some[0]), some)
    return Group(
        row.label,
        row.count,
        row.nbytes,
        row.baseline_bytes,
        row.saved_bytes,
        op=some[0].storage.op,
        module=first.module if len(modules) == 1 else star(first.module),
        where=f"{short_file(first.file)}:{first.line}" if first.file else "?",
        code=first.code,
        reason=reason_of(some[0]),
    )
