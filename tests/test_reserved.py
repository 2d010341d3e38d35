"""The comparison of a real allocator's events with the replayed ones, on events made up here."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bench.reserved import MIB, Logged, Row, alignment, at_peak, compared, planned_step, play_real, real_step
from ciuic_compile.replay import FREE, Event, Joint, Trace, replay

FORWARD = Trace(
    ("primals_1",),
    ("loss", "kept"),
    (Event("a", 8 * MIB), Event("kept", 30 * MIB), Event("loss", 4), Event("a", FREE)),
)
BACKWARD = Trace(
    ("kept", "tangents_1"),
    ("grad",),
    (Event("inside", 5 * MIB), Event("inside", FREE), Event("grad", 9 * MIB), Event("kept", FREE)),
)
JOINT = Joint(2, 1, {"kept": 1}, {"tangents_1": 4})
PLANNED: dict[str, Any] = {
    "forward": asdict(FORWARD),
    "backward": asdict(BACKWARD),
    "joint": asdict(JOINT),
    "resident": [3 * MIB],
}
START = [
    {
        "address": 1 << 30,
        "bytes": 20 * MIB,
        "small": False,
        "blocks": [(1 << 30, 3 * MIB, True), ((1 << 30) + 3 * MIB, 17 * MIB, False)],
    }
]


def real_events() -> list[list[Row]]:
    """What a real allocator would be asked in two steps of that plan; all of it is freed."""
    allocator = Logged.at(START)
    steps: list[list[Row]] = []
    for _ in range(2):
        first = len(allocator.log)
        replay(FORWARD, BACKWARD, JOINT, allocator, steps=1)
        actions = {"alloc": "alloc", "free": "free_completed"}
        steps.append([(actions[a], handle, nbytes, "") for a, handle, nbytes in allocator.log[first:]])
    return steps


def cell(steps: list[list[Row]], reserved: int) -> dict[str, Any]:
    steps_of = [{"events": events, "reserved": reserved} for events in steps]
    run = {"start": START, "end": START, "steps": steps_of}
    return {
        "model": "gpt", "config": "4:1", "batch": 1, "length": 1, "precision": "fp32", "size": "tiny",
        "fraction": None, "planned": PLANNED, "kept": run, "clean": run,
        "predicted": {"planned_peak_bytes": 38 * MIB + 512, "reserved_bytes": reserved},
        "measured": {"allocated": 38 * MIB + 512},
    }  # fmt: skip


def test_what_went_as_planned_differs_in_nothing() -> None:
    steps = real_events()
    reserved = Logged.at(START)
    replay(FORWARD, BACKWARD, JOINT, reserved)
    row, said = compared(cell(steps, reserved.reserved))
    assert row[-1] == "0"
    assert len(set(row[6:11])) == 1  # planned, real, our allocator on real events and from the real start
    assert "  0 events differ:" in said


def test_an_allocation_that_was_not_planned_is_named_and_seen_at_the_peak() -> None:
    planned = planned_step(PLANNED, Logged.at(START))
    events = real_events()[1]
    events.insert(1, ("alloc", 1, 7 * MIB, "torch.ops.aten.something"))
    real = real_step(events)
    assert [line.split(" + ")[1] for line in alignment(real, planned)] == [
        "alloc     7.000 torch.ops.aten.something"
    ]
    (most, live), (planned_most, _) = at_peak(real), at_peak(planned)
    assert most == planned_most + 7 * MIB
    assert (7 * MIB, "torch.ops.aten.something") in live


def test_an_allocation_that_never_came_has_its_planned_name() -> None:
    planned = planned_step(PLANNED, Logged.at(START))
    events = [e for e in real_events()[1] if e[2] != 5 * MIB]
    lines = alignment(real_step(events), planned)
    assert any(line.endswith("- alloc     5.000 inside") for line in lines)


def test_free_blocks_of_the_start_are_used_first() -> None:
    allocator = Logged.at(START)
    assert (allocator.allocated, allocator.reserved) == (3 * MIB, 20 * MIB)
    allocator.free(allocator.alloc(16 * MIB))
    allocator.free(1 << 30)
    allocator.alloc(19 * MIB)
    assert allocator.reserved == 20 * MIB


def test_gradients_go_between_the_steps_and_workspaces_stay() -> None:
    """Nothing is recorded there: what has its address again, or is not in use in the end, was given back."""
    gradient, workspace = 40 * MIB, 32 * MIB
    first = [("alloc", 1, gradient, ""), ("alloc", 2, workspace, "")]
    end = [*START, {**START[0], "blocks": [(1, gradient, True), (2, workspace, True)]}]
    run = {"start": START, "end": end, "steps": [{"events": first}, {"events": first[:1]}]}
    assert play_real(run, placed=False) == (20 + 40 + 32) * MIB
    run["end"] = START
    run["steps"] = [{"events": first}, {"events": [("alloc", 3, gradient + workspace, "")]}]
    assert play_real(run, placed=False) == (20 + 40 + 32 + 72) * MIB


def test_equal_blocks_are_told_apart_by_the_drivers_addresses() -> None:
    """The one at the lower address is taken: the second segment's, if the driver put it there."""
    size, low, high = 40 * MIB, 1 << 31, 1 << 32
    events = [
        ("segment_alloc", high, size, ""), ("alloc", high, size, ""),
        ("segment_alloc", low, size, ""), ("alloc", low, size, ""),
        ("free_completed", high, size, ""), ("free_completed", low, size, ""),
        ("alloc", low, 21 * MIB, ""),
    ]  # fmt: skip
    allocator = Logged.at(START)
    allocator.given = [(size, high), (size, low)]
    assert [allocator.alloc(size), allocator.alloc(size)] == [high, low]
    allocator.free(high), allocator.free(low)
    assert allocator.alloc(21 * MIB) == low
    assert play_real({"start": START, "end": START, "steps": [{"events": events}]}, placed=True) == 100 * MIB
