"""A plan as plain ASCII text. The short form is at most 25 lines of at most 120 columns for any plan."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal

from ciuic_compile.report._format import (
    ascii_line,
    crop,
    crop_left,
    duration,
    factor,
    op_label,
    percent,
    price_sentence,
    short_file,
    size,
)
from ciuic_compile.report.summary import (
    Group,
    Summary,
    action_label,
    alive_at_peak,
    merge_rows,
    reason_of,
    summarize,
)
from ciuic_compile.types import Plan

if TYPE_CHECKING:
    from rich.text import Text

MAX_LINES: Final = 25
MAX_WIDTH: Final = 120
MIN_WIDTH: Final = 80
_FULL_WIDTH: Final = 240  # the full form goes to files and scrolling terminals
_WIDE: Final = 110  # columns from which ops and the user's code are shown too
_MAX_CODECS: Final = 3
_MAX_CHANGED: Final = 6
_MAX_ALIVE: Final = 4
_MAX_KEPT: Final = 2
_MAX_NOTE_LINES: Final = 3
_MORE: Final = "report='full' shows all"

_STYLES: Final = {
    r"(?m)^ciuic plan: .*$": "bold",
    r"(?m)^  (?:alive|largest) .*$": "bold",
    r"[\d.e+]+x less|within [\d.]+ \w+ budget": "green",
    r"(?:[\d.e+]+x )?MORE|OVER [\d.]+ \w+ budget": "red",
    r"(?<=\s)[\w./-]+\.py:\d+": "cyan",
    r"(?m)^  note: ": "yellow",
}

Cells = tuple[str, ...]


def render_text(plan: Plan, detail: Literal["short", "full"] = "short", width: int = MAX_WIDTH) -> str:
    """Return the plan as printable ASCII, each line ended by a newline.

    Args:
        plan: what to show; nothing in it has been run, and the words say so.
        detail: ``"short"``: at most 25 lines; ``"full"``: every group, note and storage.
        width: columns: the short form keeps within 80 to 120 of them, the full one takes 240 or more.
    """
    full = detail == "full"
    width = max(width, _FULL_WIDTH) if full else min(max(width, MIN_WIDTH), MAX_WIDTH)
    summary = summarize(plan)
    head = [*_head(plan, full, width), *_actions(summary, full), *_alive(plan, width, full)]
    kept = _kept(summary, plan, width, None if full else _MAX_KEPT)
    notes = _notes(plan, width, None if full else _MAX_NOTE_LINES)
    room = None if full else min(_MAX_CHANGED, MAX_LINES - 1 - len(head) - len(kept) - len(notes))
    lines = [*head, *_changed(summary, width, room), *kept, *notes]
    if full:
        lines += ["", *_storages(plan, width)]
    else:
        lines = [crop(line, width) for line in lines[:MAX_LINES]]
    return "".join(line.rstrip() + "\n" for line in lines)


def render_note(text: str) -> str:
    """Return a note on one line, e.g. ``ciuic: inference graph: compiled as Inductor would``."""
    return crop(f"ciuic: {ascii_line(text)}", MAX_WIDTH) + "\n"


def styled(text: str) -> Text:
    """A report's text with colours, for a terminal; no letter of it changes."""
    from rich.text import Text

    coloured = Text(text.rstrip("\n"))
    for pattern, style in _STYLES.items():
        coloured.highlight_regex(pattern, style)
    return coloured


def _head(plan: Plan, full: bool, width: int) -> list[str]:
    shapes = "dynamic shapes, sizes as first traced" if plan.dynamic else ""
    title = " | ".join(
        ascii_line(t) for t in (plan.name or "graph", f"mode {plan.mode}", plan.device, shapes) if t
    )
    budget = ""
    if plan.budget_bytes is not None:
        fits = "within" if plan.planned_peak_bytes <= plan.budget_bytes else "OVER"
        budget = f"; {fits} {size(plan.budget_bytes)} budget"
    peaks = (plan.baseline_peak_bytes, plan.planned_peak_bytes)
    saved = (plan.baseline_saved_bytes, plan.planned_saved_bytes)
    tensors = f" in {plan.baseline_saved_count} tensors" if plan.baseline_saved_count else ""
    errors = (percent(plan.gradient_error), percent(plan.gradient_error_bound))
    cost = f"  cost   planned {duration(plan.time_us)} a step; gradient error {errors[0]}"
    cost += f", any parameter's <= {errors[1]}"
    cost += f"; plan within {percent(plan.gap)} of the best" if plan.gap >= 1e-4 else ""
    uncounted = "parameters and inputs not counted" + ", nor the optimizer" * (width >= _WIDE)
    lines = [
        f"ciuic plan: {title}",
        f"  planned = estimated before the first run; {uncounted}",
        f"  peak   Inductor {size(peaks[0])}, planned {size(peaks[1])}: {factor(*peaks)}{budget}",
        *_device(plan),
        *_sizes(plan),
        f"  saved  Inductor {size(saved[0])}{tensors}, planned {size(saved[1])}: {factor(*saved)}",
        cost,
        *_price(plan),
    ]
    if full and plan.symbolic_saved_bytes:
        lines.append(f"  saved bytes as an expression: {ascii_line(plan.symbolic_saved_bytes)}")
    if full and plan.symbolic:
        limits = (f"{s.name} ({s.source or 'an input'}, {s.range})" for s in plan.symbolic.symbols)
        lines.append(f"  compiled for {ascii_line('; '.join((*limits, *plan.symbolic.guards)))}")
    if full and plan.lower_bound:
        lines.append(f"  optimiser: lower bound {plan.lower_bound:.6g}, gap {percent(plan.gap)}")
    return lines


def _price(plan: Plan) -> list[str]:
    """What more or less of the budget is worth."""
    sentence = price_sentence(plan)
    return [f"  price  {sentence}"] if sentence else []


def _sizes(plan: Plan) -> list[str]:
    """The peak as a sum of dynamic sizes: the one that is the largest at the traced sizes."""
    if plan.symbolic is None:
        return []
    most = plan.symbolic.planned_peak
    largest = most.largest(plan.symbolic.traced)
    peak = " + ".join(size(n) if term == "1" else f"{size(n)}*{ascii_line(term)}" for n, term in largest)
    others = f", the largest of {len(most.rows)} sums" if len(most.rows) > 1 else ""
    traced = ", ".join(f"{ascii_line(s.name)}={s.traced}" for s in plan.symbolic.symbols)
    return [f"  sizes  peak {peak or '0 B'} at {traced}{others}: plan.at() has other sizes"]


def _device(plan: Plan) -> list[str]:
    """What the peak becomes on the device, and how far Inductor's schedule moved it."""
    if not plan.replayed or plan.reserved_bytes is None:
        return []
    moved = ""
    if abs(plan.planned_peak_bytes - plan.simulated_peak_bytes) > plan.simulated_peak_bytes // 100:
        moved = f"; before Inductor scheduled it: {size(plan.simulated_peak_bytes)}"
    accumulate = f"; accumulating gradients adds {size(plan.gradient_bytes)}" if plan.gradient_bytes else ""
    reserved = f"reserved {size(plan.reserved_bytes)}"
    reserved += f", process {size(plan.process_bytes)}" if plan.process_bytes is not None else ""
    held = f"{size(plan.input_bytes)} of parameters and inputs"
    held += f", {size(plan.blas_bytes)} of cuBLAS" if plan.blas_bytes else ""
    return [f"  memory {reserved} with {held}{accumulate}{moved}"]


def _actions(summary: Summary, full: bool) -> list[str]:
    rows = list(summary.rows)
    limit = 2 + _MAX_CODECS
    if not full and len(rows) > limit:
        rows[limit - 1 :] = [merge_rows("others", rows[limit - 1 :])]
    if summary.uncounted.count:
        rows.append(summary.uncounted)
    cells = [("", "tensors", "full size", "Inductor saves", "plan saves")]
    cells += [
        (r.label, str(r.count), size(r.nbytes), size(r.baseline_bytes), size(r.saved_bytes)) for r in rows
    ]
    return _table(cells, "lrrrr", MAX_WIDTH)


def _alive(plan: Plan, width: int, full: bool) -> list[str]:
    """What is alive at the peak, and which of the user's lines made it."""
    if plan.timeline is None:
        return []
    track = plan.timeline.planned
    groups = alive_at_peak(plan.timeline)
    shown = groups if full else groups[:_MAX_ALIVE]
    if not shown:
        return []
    cells: list[Cells] = []
    for g in shown:
        code = ascii_line(g.code) if width >= _WIDE else ""
        cells.append((size(g.nbytes), g.label, _times(g), *_place(g, width), code))
    inside = track.peak_step - track.forward_steps
    phase = "forward" if inside < 0 else "backward"
    simulated = ", simulated" if plan.replayed else ""
    rest = sum(g.nbytes for g in groups[len(shown) :])
    hidden = f"; {size(rest)} more" if rest else ""
    title = f"  alive at the planned peak ({size(track.peak_bytes)}{simulated}), in the {phase}{hidden}"
    return [title, *_table(cells, "rlrlll", width)]


def _changed(summary: Summary, width: int, limit: int | None) -> list[str]:
    floor = 0 if limit is None else sum(row.nbytes for row in summary.rows) // 100
    groups = [g for g in summary.changed if g.nbytes >= floor]
    if not groups or (limit is not None and limit < 1):
        return []
    shown = groups if limit is None else groups[:limit]
    cells: list[Cells] = []
    for g in shown:
        code = ascii_line(g.code) if width >= _WIDE else ""
        sizes = f"{size(g.nbytes)} -> {size(g.saved_bytes)}"
        cells.append((sizes, g.label, _times(g), *_place(g, width), code))
    return [_heading("largest compressed or recomputed", shown, groups), *_table(cells, "rlrlll", width)]


def _kept(summary: Summary, plan: Plan, width: int, limit: int | None) -> list[str]:
    floor = 0 if limit is None else plan.planned_saved_bytes // 100
    groups = [g for g in summary.kept if g.saved_bytes >= floor]
    if not groups:
        return []
    shown = groups[:limit]
    cells: list[Cells] = [(size(g.saved_bytes), _times(g), *_place(g, width)) for g in shown]
    if width < _WIDE:  # the reason needs the room
        cells = [(*row[:3], "") for row in cells]
    room = width - 8 - sum(max(len(row[i]) + 2 for row in cells) for i in range(4))
    rows = [(*row[:3], crop(ascii_line(g.reason), room), row[3]) for row, g in zip(cells, shown, strict=True)]
    return [_heading("largest not compressed", shown, groups), *_table(rows, "rrlll", width)]


def _notes(plan: Plan, width: int, limit: int | None) -> list[str]:
    lines: list[str] = []
    for note in plan.notes if limit is None else plan.notes[: limit + 1]:
        text = ascii_line(note if limit is None else note[: width * (limit + 1)])
        lines += textwrap.wrap(text, width, initial_indent="  note: ", subsequent_indent="    ")
    if limit is not None and len(lines) > limit:
        lines = [*lines[: limit - 1], f"  note: more notes than fit here; {_MORE}"]
    return lines


def _storages(plan: Plan, width: int) -> list[str]:
    cells: list[Cells] = [
        ("name", "action", "size", "saves", "error", "time", "kind", "dtype", "shape", "from", "why")
    ]
    for d in plan.decisions:
        s = d.storage
        where = f"{short_file(s.source.file)}:{s.source.line}" if s.source.file else "?"
        cells.append((
            crop(ascii_line(s.name), 40),
            action_label(d) if d.codec is None else crop(ascii_line(d.codec), 24),
            size(s.nbytes),
            size(d.saved_bytes),
            percent(d.error),
            duration(d.time_us),
            s.kind.value,
            crop(ascii_line(s.dtype), 12),
            crop("x".join(map(str, s.shape)), 24),
            crop_left(ascii_line(f"{s.source.module} {where}".strip()), 56),
            ascii_line(reason_of(d)) if d.reason or s.kept_because else "",
        ))  # fmt: skip
    return [
        f"all {len(plan.decisions)} storages, in forward order",
        *_table(cells, "llrrrrlllll", width),
    ]


def _heading(title: str, shown: Sequence[Group], every: Sequence[Group]) -> str:
    hidden = f" (first {len(shown)} of {len(every)}; {_MORE})" if len(shown) < len(every) else ""
    return f"  {title}{hidden}"


def _times(group: Group) -> str:
    return f"{group.count}x" if group.count > 1 else ""


def _place(group: Group, width: int) -> Cells:
    """Module path with op, and file:line, cut to what a row of ``width`` columns has room for."""
    narrow = width < _WIDE
    op = "" if narrow and group.module else op_label(group.op)
    module = ascii_line(group.module)
    named = f"{module} ({op})" if module and op else module or op or "?"
    room = width - 48
    where = ascii_line(group.where)
    where_room = room // 2 if narrow else room // 3
    if len(where) > where_room:
        where = where.rsplit("/", 1)[-1]
    return crop_left(named, room // 2), crop_left(where, where_room)


def _table(rows: Sequence[Cells], align: str, width: int) -> list[str]:
    """Align cells in columns, one row a line, none longer than ``width``; the last column is cut first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    lines: list[str] = []
    for row in rows:
        cells = (c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, align, strict=True))
        lines.append(crop(f"    {'  '.join(cells)}".rstrip(), width))
    return lines
