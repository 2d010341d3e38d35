"""bench/history.py on a history that was written by hand; one of a GPU is read on a GPU."""

from __future__ import annotations

from typing import Any

from bench.history import Held, at_peak, line_of


def event(action: str, addr: int, size: int, line: int) -> dict[str, Any]:
    frames = [{"filename": "??", "line": 0, "name": "malloc"}, {"filename": "/x/code.py", "line": line}]
    return {"action": action, "addr": addr, "size": size, "frames": frames}


def test_blocks_at_the_peak_by_size_and_line() -> None:
    events = [
        event("alloc", 1, 10, 7),
        event("alloc", 2, 10, 7),
        event("alloc", 3, 5, 8),
        event("free_requested", 3, 5, 0),
        event("free_requested", 9, 5, 0),  # allocated before the history began
        event("alloc", 4, 20, 9),
        event("free_requested", 1, 10, 0),
        event("alloc", 5, 9, 10),
    ]
    most, held, where = at_peak(events)
    assert most == 40
    assert held == [Held(2, 10, "code.py:7 "), Held(1, 20, "code.py:9 ")]
    assert where == "code.py:9 "


def test_an_allocation_without_python_frames() -> None:
    assert line_of([{"filename": "??", "line": 0, "name": "malloc"}]) == "?"
