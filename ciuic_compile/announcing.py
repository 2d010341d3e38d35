"""Tell whoever asked of every plan that is made for a compiled graph. Imports nothing, torch least of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .types import Plan

_listeners: list[Callable[[Plan], None]] = []


def announce(plan: Plan) -> None:
    """A training graph was compiled by this plan."""
    for listener in tuple(_listeners):
        listener(plan)


@contextmanager
def listening(listener: Callable[[Plan], None]) -> Iterator[None]:
    """Have ``listener`` called with every plan of a graph that is compiled meanwhile, in any thread."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
