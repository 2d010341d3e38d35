"""Plans in words: what is alive at the peak, why a tensor got what it got, and what would change that."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from ciuic_compile.errors import OptionError, nearest
from ciuic_compile.report._format import (
    ascii_line,
    codec_label,
    crop,
    duration,
    op_label,
    price_sentence,
    short_file,
    size,
    star,
    step_name,
)
from ciuic_compile.report.summary import action_label, reason_of
from ciuic_compile.types import Action, Block, Decision, Line, Plan, Source, TensorClass, Timeline

_SHOWN = 15
_HARD = (TensorClass.INPUT, TensorClass.INDEX, TensorClass.STATISTIC)


def explain_peak(plan: Plan, width: int = 120) -> str:
    """What is alive at the planned peak, largest first, layers together, and what would lower it."""
    lines = [
        f"ciuic explain: {plan.name} | mode {plan.mode} | {plan.device}",
        f"  planned peak {size(plan.planned_peak_bytes)}, Inductor's {size(plan.baseline_peak_bytes)}",
        f"  parameters and inputs, {size(plan.input_bytes)}, not counted",
    ]
    if plan.timeline is None:
        lines += ["  saved for the backward, largest first:", *_saved(plan, width)]
    else:
        lines += _alive(plan.timeline, width)
    return "\n".join([*lines, *(f"  {line}" for line in _advice(plan))]) + "\n"


def explain_tensor(plan: Plan, what: str, width: int = 120) -> str:
    """Every storage that ``what`` names, in full.

    Args:
        what: the tensor's name or id, its module (with * as in fnmatch; what is inside it, too), or a line
            of the program as ``file:line``.

    Raises:
        LookupError: it names none.
    """
    found = [d for d in plan.decisions if _names(what, d)]
    if not found:
        raise LookupError(what)
    groups: dict[tuple[str, ...], list[Decision]] = {}
    for d in found:
        s = d.storage
        key = (action_label(d), s.op, star(s.source.module), s.source.where, str(s.shape), reason_of(d))
        groups.setdefault(key, []).append(d)
    order = sorted(groups.values(), key=lambda some: -sum(d.storage.nbytes for d in some))
    head = f"ciuic explain: {what} | {plan.name} | mode {plan.mode} | {plan.device}\n"
    return head + "\n".join(crop(line, width) for some in order for line in _one(plan, some)) + "\n"


def nothing_named(what: str, plans: Sequence[Plan]) -> OptionError:
    """The error for words that name no tensor of any of the plans."""
    storages = [d.storage for plan in plans for d in plan.decisions]
    lines = {f"{short_file(s.source.file)}:{s.source.line}" for s in storages if s.source.file}
    modules = {s.source.module for s in storages if s.source.module}
    some = ", ".join(sorted(lines)[:8])
    return OptionError(
        f"no tensor that could be saved is called or made at {what!r}{nearest(what, lines | modules)}\n"
        f"  valid: a tensor's name or id, a module such as 'blocks.*.mlp', or file:line, e.g. {some}\n"
        "  fix: `ciuic plan TARGET --report full` lists them all"
    )


def _names(what: str, decision: Decision) -> bool:
    storage = decision.storage
    if what in (storage.name, storage.id):
        return True
    file, colon, line = what.rpartition(":")
    if colon and line.isdigit():
        path = storage.source.file.replace("\\", "/")
        return storage.source.line == int(line) and f"/{path}".endswith(f"/{file.lstrip('./')}")
    parts = storage.source.module.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:end]), what) for end in range(1, len(parts) + 1))


def _alive(timeline: Timeline, width: int) -> list[str]:
    track = timeline.planned
    step = track.peak_step
    groups: dict[tuple[str, ...], list[Block]] = {}
    for block in track.alive(step):
        line = timeline.line(block)
        where = _where(line)
        key = (block.role.value, block.codec or "", star(block.module), where, line.code)
        groups.setdefault(key, []).append(block)
    order = sorted(groups.items(), key=lambda item: -sum(b.nbytes for b in item[1]))
    rows = []
    for (role, codec, module, where, code), blocks in order[:_SHOWN]:
        what = f"{role} {codec_label(codec)}" if codec else role
        rows.append(_row(sum(b.nbytes for b in blocks), len(blocks), what, module, where, code, width))
    rest = sum(b.nbytes for _, blocks in order[_SHOWN:] for b in blocks)
    more = [f"  {size(rest):>10}       in {len(order) - _SHOWN} more groups"] if rest else []
    return [f"  alive at the simulated peak, {step_name(track, step)}:", *rows, *more]


def _saved(plan: Plan, width: int) -> list[str]:
    groups: dict[tuple[str, ...], list[Decision]] = {}
    for d in plan.decisions:
        if d.saved_bytes and d.storage.kind is not TensorClass.INPUT:
            source = d.storage.source
            where = _where(source)
            key = (action_label(d), star(source.module), where, source.code)
            groups.setdefault(key, []).append(d)
    order = sorted(groups.items(), key=lambda item: -sum(d.saved_bytes for d in item[1]))
    return [
        _row(sum(d.saved_bytes for d in some), len(some), label, module, where, code, width)
        for (label, module, where, code), some in order[:_SHOWN]
    ]


def _row(nbytes: int, count: int, what: str, module: str, where: str, code: str, width: int) -> str:
    times = f"{count}x" if count > 1 else ""
    room = 32 if width >= 100 else 16  # the line of the user's program must not be cut off
    text = f"  {size(nbytes):>10} {times:>5} {what:<16} {crop(module, room):<{room}} {where}  {code}"
    return crop(_ascii(text), width)


def _ascii(text: str) -> str:
    """Printable ASCII, columns as they are."""
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode("ascii") for c in text)


def _where(source: Source | Line) -> str:
    """``file:line``, or ``?``."""
    return f"{short_file(source.file)}:{source.line}" if source.file else "?"


def _advice(plan: Plan) -> list[str]:
    lines = ["what would change it:"]
    if plan.price is not None:
        lines.append(f"  the budget: {price_sentence(plan)}")
    elif plan.budget_bytes is None:
        lines.append("  a budget below this peak (--budget SIZE) makes the planner aim at the peak itself")
    exact = sorted(
        (d for d in plan.decisions if d.action is Action.KEEP and d.storage.kind is not TensorClass.INPUT),
        key=lambda d: -d.saved_bytes,
    )
    seen: set[str] = set()
    for d in exact:
        label = f"{star(d.storage.source.module)} {op_label(d.storage.op)}"
        if len(seen) < 3 and d.saved_bytes and label not in seen:
            seen.add(label)
            lines.append(f"  {label.strip()} is exact: {ascii_line(reason_of(d))}; {_change(plan, d)}")
    return lines


def _one(plan: Plan, some: Sequence[Decision]) -> list[str]:
    d, s = some[0], some[0].storage
    total = sum(x.storage.nbytes for x in some)
    times = f"{len(some)} tensors, " if len(some) > 1 else ""
    module = s.source.module if len(some) == 1 else star(s.source.module)
    name = s.name if len(some) == 1 else f"{s.name}, ..."
    lines = [
        f"  {name}: {times}{op_label(s.op)} in {module or 'the step'}",
        f"    made at    {_where(s.source)}  {ascii_line(s.source.code)}".rstrip(),
        f"    is         {s.dtype} {list(s.shape)}, {size(total)}; class {s.kind.value}",
        f"    Inductor   saves {size(sum(x.baseline_bytes for x in some))}",
        f"    the plan   {_verdict(d, sum(x.saved_bytes for x in some))}",
        f"    because    {ascii_line(reason_of(d))}",
        f"    to change  {_change(plan, d)}",
    ]
    if d.time_us or d.error:
        cost = duration(sum(x.time_us for x in some))
        lines.insert(-1, f"    costs      {cost} a step, gradient error {max(x.error for x in some):.2g}")
    return lines


def _verdict(decision: Decision, nbytes: int) -> str:
    if decision.action is Action.RECOMPUTE:
        return "does not save it: it is computed again"
    if decision.action is Action.COMPRESS:
        return f"saves {size(nbytes)} as {codec_label(decision.codec)}"
    return f"saves {size(nbytes)}, exact"


def _change(plan: Plan, decision: Decision) -> str:
    """What the user could do for another decision."""
    storage = decision.storage
    module = storage.source.module or op_label(storage.op)
    if decision.action is Action.RECOMPUTE:
        return (
            "a torch.utils.checkpoint policy of MUST_SAVE keeps it; so may a larger budget or a lower ratio"
        )
    if decision.action is Action.COMPRESS:
        return f"the option deny={module!r} keeps it exact; a lower ratio keeps more bits"
    reason = reason_of(decision)
    if reason.startswith("deny"):
        return f"take the pattern out of deny ({reason})"
    if reason == "not in allow":
        return f"add {module!r} to the option allow"
    if reason.startswith("smaller than min_bytes"):
        return f"a smaller option min_bytes than {storage.nbytes}"
    if plan.mode == "lossless":
        return "mode R:1, such as 4:1, may compress it"
    if storage.kept_because is None:
        return "a higher ratio or a lower budget"
    if storage.kind in _HARD:
        return "nothing: compressed, it would be wrong; a smaller batch, or other code, makes it smaller"
    return "no option: this rule guards accuracy (docs/numerics.md); other code may not need it saved"
