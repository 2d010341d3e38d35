"""Properties of a node that follow from what it calls, found once for each operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import fx

T = TypeVar("T")


def by_op(rule: Callable[[Any], T]) -> Callable[[fx.Node], T]:
    """A property of a node by a rule about its target, which is remembered for operators.

    By identity: operators' own hashes take longer than that (they are computed in Python).
    """
    known: dict[int, tuple[object, T]] = {}  # with the operators, so that they stay alive

    @functools.wraps(rule)
    def of(node: fx.Node) -> T:
        target = node.target
        found = known.get(id(target))
        if found is not None:
            return found[1]
        result = rule(target)
        if isinstance(target, torch._ops.OpOverload):
            known[id(target)] = target, result
        return result

    return of
