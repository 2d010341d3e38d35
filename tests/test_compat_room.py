"""Calls under ``with_room`` need no memory for their frames."""

from __future__ import annotations

import resource
from collections.abc import Callable
from functools import partial
from threading import Thread

from ciuic_compile.compat_room import with_room

_CALLS = 1000


def _short() -> None:
    pass


# Larger than the frames of _faults_of_calls: at some depth those fit the chunk and this does not.
_short.__code__ = _short.__code__.replace(co_stacksize=100)


def _faults_of_calls(depth: int) -> int:
    """Page faults of many short calls, made so deep in the stack."""
    if depth:
        return _faults_of_calls(depth - 1)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(_CALLS):
        _short()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_short_calls_at_any_depth_fault_no_pages() -> None:
    # CPython 3.11 without room: a fault for each call, where the frames of a depth fill a chunk of 16 KiB.
    def run() -> None:
        found.extend(with_room(partial(_faults_of_calls, depth)) for depth in range(300))

    found: list[int] = []
    thread = Thread(target=run)  # its frames begin in a chunk of their own
    thread.start()
    thread.join()
    assert len(found) == 300 and max(found) < _CALLS / 10


def test_what_the_function_returns_or_raises_comes_out() -> None:
    def failing() -> int:
        raise KeyError("of the function")

    assert with_room(lambda: 7) == 7
    function: Callable[[], int] = failing
    try:
        with_room(function)
    except KeyError as error:
        assert error.args == ("of the function",)
    else:
        raise AssertionError("the error was lost")
