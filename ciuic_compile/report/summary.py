"""A plan condensed to what a reader asks first; text and HTML are drawn from this."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ciuic_compile.report._format import codec_bits, codec_label, short_file, star
from ciuic_compile.types import Action, Block, Decision, Plan, TensorClass, Timeline

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


def alive_at_peak(timeline: Timeline) -> list[Group]:
    """What is alive at the planned peak: blocks of one use that the same line of identical layers makes."""
    members: dict[tuple[str, str, int | None], list[Block]] = {}
    for block in timeline.planned.alive(timeline.planned.peak_step):
        members.setdefault((block.role.value, star(block.module), block.line), []).append(block)
    groups = []
    for (role, module, _), blocks in members.items():
        line, nbytes = timeline.line(blocks[0]), sum(b.nbytes for b in blocks)
        ops = {_op_of(b.id) for b in blocks}
        groups.append(
            Group(
                role,
                len(blocks),
                nbytes,
                0,
                nbytes,
                op=ops.pop() if len(ops) == 1 else "",
                module=blocks[0].module if len({b.module for b in blocks}) == 1 else module,
                where=f"{short_file(line.file)}:{line.line}" if line.file else "?",
                code=line.code,
                reason="",
            )
        )
    return sorted(groups, key=lambda g: (-g.nbytes, g.label, g.module, g.where))


def _op_of(block: str) -> str:
    """The op in a block's id."""
    return next((part.split("#")[0] for part in reversed(block.split("/")) if "#" in part), "")


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
