"""A plan's timeline for other tools: PyTorch's memory_viz, Perfetto (or chrome://tracing), and Markdown.

A step has no duration in a plan, so traces count steps: one microsecond each.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from typing import Any, Final

from ciuic_compile.allocator import SMALL_SEGMENT, CachingAllocator, _Block
from ciuic_compile.report._format import (
    ascii_line,
    crop,
    duration,
    factor,
    percent,
    price_sentence,
    short_file,
    size,
)
from ciuic_compile.report.summary import merge_rows, summarize
from ciuic_compile.types import Block, Plan, Role, Timeline, Track

_TRACKS: Final = (("planned", "ciuic, planned"), ("baseline", "Inductor's own partition"))
Item = dict[str, Any]
_MOST: Final = 8  # rows of a table in Markdown


def to_memory_viz(plan: Plan) -> bytes:
    """A snapshot as ``torch.cuda.memory._snapshot()`` gives one, pickled: drop it on pytorch.org/memory_viz.

    Device 0 is the plan, device 1 Inductor's own partition. Addresses and segments are those that torch's
    caching allocator would choose, asked in the order of the timeline; sizes are those asked for. Only plain
    dicts, lists, strings and numbers are in it.
    """
    snapshot: dict[str, Any] = {"segments": [], "device_traces": []}
    if plan.timeline is not None:
        for device, (key, _) in enumerate(_TRACKS):
            segments, events = _events(plan.timeline, getattr(plan.timeline, key), device)
            snapshot["segments"] += segments
            snapshot["device_traces"].append(events)
    return pickle.dumps(snapshot, protocol=4)  # the newest that the page's reader knows


class _Segments(CachingAllocator):
    """Says which segments it took from the device since it was last asked."""

    def __init__(self) -> None:
        super().__init__()
        self._new: list[tuple[int, int]] = []

    def taken(self) -> list[tuple[int, int]]:
        """Address and bytes of each."""
        new, self._new = self._new, []
        return new

    def _segment(self, size: int, small: bool) -> _Block:
        block = super()._segment(size, small)
        self._new.append((block.address, block.size))
        return block


def _events(
    timeline: Timeline, track: Track, device: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The segments, all of them free in the end; and what is allocated and freed, in order."""
    allocator = _Segments()
    base = (device + 1) << 44
    starting, ending = _by_step(track)
    handles: dict[str, int] = {}
    events: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    for step in range(len(track.steps) + 1):
        for block in ending.get(step - 1, ()):
            address = handles.pop(block.id)
            allocator.free(address)
            about = _about(timeline, block, base + address)
            events += [{"action": action, **about} for action in ("free_requested", "free_completed")]
        for block in starting.get(step, ()):
            handles[block.id] = address = allocator.alloc(block.nbytes)
            for start, nbytes in allocator.taken():
                segments.append(_segment(device, base + start, nbytes))
                where = {"addr": base + start, "size": nbytes, "stream": 0, "frames": []}
                events.append({"action": "segment_alloc", **where})
            about = _about(timeline, block, base + address)
            events.append({"action": "alloc", **about, "category": block.role.value})
    # the page wants this category where there are others: it adds it by a misspelled name, and stops
    events.append({"action": "snapshot", "stream": 0, "frames": [], "category": "unknown"})
    return segments, events


def _segment(device: int, address: int, nbytes: int) -> dict[str, Any]:
    hole = {"address": address, "size": nbytes, "requested_size": 0, "state": "inactive", "frames": []}
    return {
        "device": device,
        "address": address,
        "total_size": nbytes,
        "allocated_size": 0,
        "active_size": 0,
        "requested_size": 0,
        "stream": 0,
        "segment_type": "small" if nbytes <= SMALL_SEGMENT else "large",
        "is_expandable": False,
        "frames": [],
        "blocks": [hole],
    }


def _about(timeline: Timeline, block: Block, address: int) -> dict[str, Any]:
    line = timeline.line(block)
    made = f"{block.id} {_tensor(block)}".strip()
    frames = [{"filename": "plan", "line": 0, "name": made}]
    if line.file:
        frames.append({"filename": line.file, "line": line.line, "name": line.code})
    return {"addr": address, "size": block.nbytes, "stream": 0, "frames": frames}


def to_perfetto(plan: Plan) -> str:
    """Chrome's trace event format, which ui.perfetto.dev and chrome://tracing open.

    Two processes, the plan and Inductor's own partition, each with a counter of bytes by use, the kernels,
    and an asynchronous slice for each storage.
    """
    events: list[dict[str, Any]] = []
    for pid, (key, name) in enumerate(_TRACKS, 1):
        if plan.timeline is None:
            break
        track: Track = getattr(plan.timeline, key)
        events.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}})
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": 1, "args": {"name": "kernels"}})
        events += _counter(track, pid)
        for ts, step in enumerate(track.steps):
            graph = "forward" if ts < track.forward_steps else "backward"
            title = step or "between forward and backward"
            place = {"ts": ts, "dur": 1, "pid": pid, "tid": 1}
            events.append({"ph": "X", "name": title, "cat": graph, **place})
        for number, block in enumerate(track.blocks):
            about: Item = {"cat": block.role.value, "name": block.id, "pid": pid, "tid": 2}
            about["id2"] = {"local": hex(number)}
            line = plan.timeline.line(block)
            arguments = {
                "bytes": block.nbytes,
                "tensor": _tensor(block),
                "codec": block.codec or "none",
                "from": f"{line.file}:{line.line}" if line.file else "not known",
                "line": line.code,
            }
            events.append({"ph": "b", "ts": block.first, **about, "args": arguments})
            events.append({"ph": "e", "ts": block.last + 1, **about})
    document = {
        "traceEvents": sorted(events, key=lambda e: e.get("ts", -1)),
        "displayTimeUnit": "ns",
        "otherData": {
            "plan": plan.name,
            "mode": plan.mode,
            "note": "1 us is one kernel: a plan has no times",
        },
    }
    return json.dumps(document, separators=(",", ":"), ensure_ascii=True) + "\n"


def _counter(track: Track, pid: int) -> Iterable[dict[str, Any]]:
    """Bytes alive by use, wherever they change."""
    starting, ending = _by_step(track)
    alive = dict.fromkeys((role.value for role in Role), 0)
    for ts in range(len(track.steps) + 1):
        for block in ending.get(ts - 1, ()):
            alive[block.role.value] -= block.nbytes
        for block in starting.get(ts, ()):
            alive[block.role.value] += block.nbytes
        yield {"ph": "C", "name": "bytes alive", "ts": ts, "pid": pid, "tid": 0, "args": dict(alive)}


def _by_step(track: Track) -> tuple[dict[int, list[Block]], dict[int, list[Block]]]:
    """Blocks by the first and by the last step at which they are alive."""
    starting: dict[int, list[Block]] = {}
    ending: dict[int, list[Block]] = {}
    for block in track.blocks:
        starting.setdefault(block.first, []).append(block)
        ending.setdefault(block.last, []).append(block)
    return starting, ending


def _tensor(block: Block) -> str:
    return f"{block.dtype}[{','.join(map(str, block.shape))}]" if block.dtype else ""


def to_markdown(plan: Plan) -> str:
    """The plan as GitHub's Markdown, for a comment on a change: figures, actions, the largest at the peak."""
    peaks = (plan.baseline_peak_bytes, plan.planned_peak_bytes)
    saved = (plan.baseline_saved_bytes, plan.planned_saved_bytes)
    budget = ""
    if plan.budget_bytes is not None:
        fits = "within" if plan.planned_peak_bytes <= plan.budget_bytes else "OVER"
        budget = f", {fits} the {size(plan.budget_bytes)} budget"
    memory = [("peak", size(peaks[0]), size(peaks[1]), factor(*peaks) + budget)]
    memory.append(("saved", size(saved[0]), size(saved[1]), factor(*saved)))
    for title, nbytes in (("reserved", plan.reserved_bytes), ("process", plan.process_bytes)):
        if nbytes is not None:
            memory.append(
                (title, "", size(nbytes), f"with {size(plan.input_bytes)} of parameters and inputs")
            )
    summary = summarize(plan)
    rows = [*summary.rows] if len(summary.rows) <= _MOST else [merge_rows("all", summary.rows)]
    actions = [
        (r.label, str(r.count), size(r.nbytes), size(r.baseline_bytes), size(r.saved_bytes)) for r in rows
    ]
    title = " | ".join(t for t in (plan.name or "graph", f"mode {plan.mode}", plan.device) if t)
    cost = f"{duration(plan.time_us)} a step; gradient error {percent(plan.gradient_error)}"
    parts = [
        f"### ciuic plan: {_words(title)}",
        _table(("", "Inductor", "planned", "change"), memory, "lrrl"),
        f"Cost: {cost}, any parameter's at most {percent(plan.gradient_error_bound)}.",
        _table(("action", "tensors", "full size", "Inductor saves", "plan saves"), actions, "lrrrr"),
    ]
    if plan.timeline is not None:
        parts += _at_peak(plan.timeline)
    parts += [f"Price of the budget: {sentence}." for sentence in filter(None, [price_sentence(plan)])]
    parts += [f"Note: {_words(note)}" for note in plan.notes]
    parts.append("Estimated before the first run; parameters and inputs are not counted in peak and saved.")
    return "\n\n".join(parts) + "\n"


def _at_peak(timeline: Timeline) -> list[str]:
    track = timeline.planned
    there = track.alive(track.peak_step)
    rows = []
    for block in there[:_MOST]:
        line = timeline.line(block)
        where = f"{short_file(line.file)}:{line.line}" if line.file else ""
        rows.append((size(block.nbytes), block.role.value, block.id, where, line.code))
    if not rows:
        return []
    text = f"Largest of the {len(there)} storages alive at the simulated peak ({size(track.peak_bytes)}):"
    return [text, _table(("bytes", "use", "storage", "from", "line"), rows, "rllll", code=(2, 4))]


def _table(
    head: tuple[str, ...], rows: Iterable[tuple[str, ...]], align: str, code: tuple[int, ...] = ()
) -> str:
    rule = ["---:" if a == "r" else "---" for a in align]
    lines = [head, tuple(rule)]
    for row in rows:
        lines.append(tuple((_code if i in code else _words)(cell) for i, cell in enumerate(row)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _words(text: str) -> str:
    """Text in which nothing is markup."""
    plain = crop(ascii_line(text), 400)
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~@" else c for c in plain)


def _code(text: str) -> str:
    """Text as code in a cell of a table: there, only a bar must be escaped, and backticks outnumbered."""
    plain = crop(ascii_line(text), 120).replace("|", "\\|")
    if not plain:
        return ""
    fence = "`"
    while fence in plain:
        fence += "`"
    return f"{fence} {plain} {fence}"


WRITERS: Final[dict[str, Callable[[Plan], str | bytes]]] = {
    ".md": to_markdown,
    ".perfetto.json": to_perfetto,
    ".trace.json": to_perfetto,
    ".pickle": to_memory_viz,
}
"""By the suffix of a report's path."""
