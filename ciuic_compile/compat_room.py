"""Room for Python's frames, for code that makes many short calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def _called(function: Callable[[], Result]) -> Result:
    return function()


# CPython 3.11 keeps frames in chunks of 16 KiB (Python/pystate.c, push_chunk), and gives a chunk back to the
# system as soon as its first frame returns: loops whose calls happen to cross the end of a chunk spend most
# of their time in mmap, munmap and page faults (a fifth to a half of a partitioning's, by depth of calls).
# A frame that claims 256 KiB gets a chunk of 512, and all that it calls lives in the rest of that.
_called.__code__ = _called.__code__.replace(co_stacksize=2**15)


def with_room(function: Callable[[], Result]) -> Result:
    """What a function returns that makes many short calls: none of them needs memory for its frame."""
    return _called(function)
