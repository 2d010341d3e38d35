"""Exports, held against what reads them: torch's own functions, the page's logic, the trace format."""

from __future__ import annotations

import itertools
import json
import pickle
import pickletools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.cuda import _memory_viz as viz

from ciuic_compile.config import parse_options
from ciuic_compile.errors import OptionError
from ciuic_compile.report import emit, to_markdown, to_memory_viz, to_perfetto
from ciuic_compile.types import Plan, Timeline, Track

#: Those that torch/utils/viz/MemoryViz.js reads (its function ``unpickle``).
READABLE = {
    *(
        "PROTO",
        "APPEND",
        "APPENDS",
        "LIST",
        "TUPLE",
        "NEWFALSE",
        "NEWTRUE",
        "NONE",
        "BINGET",
        "BININT",
        "BININT1",
    ),
    *("BININT2", "EMPTY_DICT", "EMPTY_LIST", "FRAME", "LONG1", "LONG_BINGET", "MARK", "MEMOIZE", "BINPUT"),
    *("LONG_BINPUT", "SETITEMS", "SETITEM", "DICT", "SHORT_BINUNICODE", "BINUNICODE", "STOP", "EMPTY_TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "BINFLOAT"),
}


def tracks(plan: Plan) -> list[Track]:
    assert plan.timeline is not None
    return [plan.timeline.planned, plan.timeline.baseline]


def read_as_the_page_does(snapshot: dict[str, Any], device: int) -> tuple[int, list[tuple[int, int]]]:
    """After MemoryViz.js: the most bytes of "Active Memory Timeline", and the segments of its other views.

    Fails where the page would stop: an unknown stream, a free of what is not allocated, a block in no
    segment, or categories without "unknown".
    """
    categories = {e["category"] for trace in snapshot["device_traces"] for e in trace if "category" in e}
    assert "unknown" in categories
    live: dict[int, int] = {}
    most = 0
    segments = [(s["address"], s["total_size"]) for s in snapshot["segments"] if s["device"] == device]
    for e in snapshot["device_traces"][device]:
        assert e["stream"] == 0 and isinstance(e["frames"], list)
        assert all({"filename", "line", "name"} == set(f) for f in e["frames"])
        if e["action"] == "alloc":
            assert e["addr"] not in live
            assert any(
                start <= e["addr"] and e["addr"] + e["size"] <= start + size for start, size in segments
            )
            live[e["addr"]] = e["size"]
        elif e["action"] == "free_completed":
            assert live.pop(e["addr"]) == e["size"]
        most = max(most, sum(live.values()))
    assert not live
    for segment in snapshot["segments"]:
        assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"]
    return most, segments


def test_memory_viz_reads_the_snapshot(small: Plan) -> None:
    data = to_memory_viz(small)
    assert {opcode.name for opcode, _, _ in pickletools.genops(data)} <= READABLE
    snapshot = pickle.loads(data)
    for device, track in enumerate(tracks(small)):
        most, segments = read_as_the_page_does(snapshot, device)
        assert most == track.peak_bytes
        ends = sorted((start, start + size) for start, size in segments)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    text = viz.trace(snapshot)
    assert text.count("cudaMalloc") == len(snapshot["segments"])
    assert text.count("\ndel ") == sum(len(t.blocks) for t in tracks(small))
    summary = viz.segsum(snapshot)  # adds up every segment, and asserts
    assert f"segments: {len(snapshot['segments'])}" in summary
    assert "total_allocated: 0.0" in summary
    assert "Active Memory Timeline" in viz.trace_plot(snapshot)
    paired = viz.filter_alloc_free_pairs(pickle.loads(data))
    assert {e["action"] for t in paired["device_traces"] for e in t} == {"segment_alloc", "snapshot"}


def test_memory_viz_compares_two_snapshots(small: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = pickle.loads(to_memory_viz(small))
    before, after = ([s for s in snapshot["segments"] if s["device"] == d] for d in (1, 0))
    lines: list[str] = []
    viz.compare(before, after, format_flamegraph=lambda text: lines.extend(text.splitlines()) or "")
    assert len(lines) == 2 * (len(before) + len(after))  # what is used of each, and its gap
    for check in (viz.segments, viz.memory):
        text = check(snapshot, format_flamegraph=lambda text: text)
        assert text.count("<gaps>") == len(snapshot["segments"])


def test_frames_name_the_users_line(small: Plan) -> None:
    snapshot = pickle.loads(to_memory_viz(small))
    allocated = [e for e in snapshot["device_traces"][0] if e["action"] == "alloc"]
    block = tracks(small)[0].blocks[0]
    assert allocated[0]["frames"][0]["name"].startswith(block.id)
    assert allocated[0]["category"] == block.role.value
    assert viz._frames_fmt(allocated[0]["frames"])[1].startswith("part")


def is_a_trace(document: dict[str, Any]) -> None:
    """The rules of the trace event format (Google's document "Trace Event Format") for what we use of it."""
    open_slices: Counter[tuple[Any, ...]] = Counter()
    last = -1
    for e in document["traceEvents"]:
        assert isinstance(e["name"], str) and isinstance(e["pid"], int) and isinstance(e["tid"], int)
        if e["ph"] == "M":
            assert e["name"] in ("process_name", "thread_name") and isinstance(e["args"]["name"], str)
            continue
        assert e["ts"] >= last
        last = e["ts"]
        if e["ph"] == "C":
            assert e["args"] and all(isinstance(v, int) and v >= 0 for v in e["args"].values())
        elif e["ph"] == "X":
            assert e["dur"] > 0
        else:
            key = (e["pid"], e["cat"], e["id2"]["local"], e["name"])
            assert int(e["id2"]["local"], 16) >= 0
            open_slices[key] += {"b": 1, "e": -1}[e["ph"]]
            assert open_slices[key] in (0, 1)
    assert not +open_slices


def test_perfetto_reads_the_trace(small: Plan) -> None:
    document = json.loads(to_perfetto(small))
    is_a_trace(document)
    for pid, track in enumerate(tracks(small), 1):
        counters = [e for e in document["traceEvents"] if e["ph"] == "C" and e["pid"] == pid]
        assert [sum(e["args"].values()) for e in counters] == [*track.totals(), 0]
        begun = [e for e in document["traceEvents"] if e["ph"] == "b" and e["pid"] == pid]
        assert sorted((e["name"], e["args"]["bytes"], e["ts"]) for e in begun) == sorted(
            (b.id, b.nbytes, b.first) for b in track.blocks
        )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_plan_can_be_exported(plans: st.SearchStrategy[Plan], data: st.DataObject) -> None:
    plan = data.draw(plans)
    is_a_trace(json.loads(to_perfetto(plan)))
    snapshot = pickle.loads(to_memory_viz(plan))
    for device, track in enumerate(tracks(plan) if plan.timeline else []):
        assert read_as_the_page_does(snapshot, device)[0] == track.peak_bytes
    text = to_markdown(plan)
    assert text.isascii()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) >= 4


def test_markdown_says_what_a_reviewer_asks(small: Plan) -> None:
    text = to_markdown(replace(small, budget_bytes=small.planned_peak_bytes - 1))
    for words in (
        "### ciuic plan: graph 0",
        "| peak |",
        "OVER the",
        "gradient error 1%",
        "| kept |",
        "net/part",
    ):
        assert words in text
    assert len(text) < 6000


def test_markup_in_names_is_text(small: Plan) -> None:
    assert small.timeline is not None
    evil = "</td> `x` | <img src=x> @team #1"
    line = replace(small.timeline.lines[0], code=evil)
    timeline = Timeline((line,) * len(small.timeline.lines), small.timeline.baseline, small.timeline.planned)
    text = to_markdown(replace(small, name=evil, notes=(evil,), timeline=timeline))
    assert "\\<img" in text and "\\@team" in text
    assert "``  </td>" not in text
    rows = [row for row in text.splitlines() if row.startswith("|") and "</td>" in row]
    assert rows
    for row in rows:
        assert "`` </td> `x` \\| <img src=x> @team #1 ``" in row  # code: nothing in it is markup


@pytest.mark.parametrize("name", ["plan.md", "plan.pickle", "plan.trace.json", "plan.perfetto.json"])
def test_written_by_suffix(name: str, small: Plan, tmp_path: Any) -> None:
    config = parse_options({"report": tmp_path / name})
    first, second = emit(small, config), emit(small, config)
    stem, suffix = name.split(".", 1)
    assert [first, second] == [str(tmp_path / name), str(tmp_path / f"{stem}-2.{suffix}")]
    content = (tmp_path / name).read_bytes()
    assert content == (tmp_path / f"{stem}-2.{suffix}").read_bytes()
    if suffix == "md":
        assert content.startswith(b"### ciuic plan")
    elif suffix == "pickle":
        assert set(pickle.loads(content)) == {"segments", "device_traces"}
    else:
        is_a_trace(json.loads(content))


@pytest.mark.parametrize("name", ["plan.pkl", "plan.trace", ".trace.json", "plan.markdown"])
def test_other_suffixes_are_an_error_that_names_the_valid_ones(name: str, tmp_path: Any) -> None:
    with pytest.raises(OptionError, match=r"'\.pickle', '\.perfetto\.json', '\.trace\.json'"):
        parse_options({"report": str(tmp_path / name)})
