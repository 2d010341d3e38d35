"""When values are alive in the backward, as 0/1 expressions over the columns of what is rebuilt.

Two families, both conditional on the value's being stored or rebuilt at all:

* ``started(v, t)``: something needs v at step t or before;
* ``needed_from(v, t)``: something needs v at step t or after.

They refer to nothing but the same expressions of what may be rebuilt from v, at steps t and t - 1, so
that a step costs what is undecided there and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .program import ABSENT, Decision, Problem

Kind = Literal["started", "needed"]


@dataclass(frozen=True)
class Expr:
    """``constant + sum(coefficient * column)``; 0 or 1 wherever the columns are."""

    constant: int
    terms: tuple[tuple[int, int], ...] = ()

    def __invert__(self) -> Expr:
        return Expr(1 - self.constant, tuple((c, -k) for c, k in self.terms))


ZERO, ONE = Expr(0), Expr(1)


@dataclass(frozen=True)
class Range:
    """Bounds on the first and the last need of a value, over all decisions in which it is needed."""

    first_min: int
    first_max: int
    last_min: int
    last_max: int


class Lifetimes:
    """The expressions written so far, and the rows that define them.

    Args:
        rebuild: the column of each candidate's being rebuilt, -1 where it cannot be.
        column: makes a new column between 0 and 1.
        row: adds ``low <= terms <= high``.
    """

    def __init__(
        self,
        problem: Problem,
        rebuild: Sequence[int],
        column: Callable[[], int],
        row: Callable[[Sequence[tuple[int, int]], float, float], None],
    ) -> None:
        self.problem, self.rebuild = problem, rebuild
        self._auxiliary, self._bound = column, row
        self.ranges = _ranges(problem)
        self._memo: dict[tuple[object, ...], Expr] = {}
        self._open: dict[tuple[Kind, int, int], int] = {}

    def started(self, v: int, step: int) -> Expr:
        """Whether something needs v at this step or before."""
        r = self.ranges[v]
        if r is None or step < r.first_min:
            return ZERO
        return ONE if step >= r.first_max else self._recursive("started", v, step)

    def needed_from(self, v: int, step: int) -> Expr:
        """Whether something needs v at this step or after."""
        r = self.ranges[v]
        if r is None or step > r.last_max:
            return ZERO
        return ONE if step <= r.last_min else self._recursive("needed", v, step)

    def _recursive(self, kind: Kind, v: int, step: int) -> Expr:
        """An expression that refers to those of v's readers.

        Written out at once if theirs are known; else a free column stands for it, which is a relaxation,
        until ``write_out`` ties it to them.
        """
        key = (kind, v, step)
        if key not in self._memo:
            causes = self._causes(kind, v, step)
            if causes is not None:
                self._memo[key] = self._or(causes)
            else:
                self._open[key] = self._auxiliary()
                self._memo[key] = Expr(0, ((self._open[key], 1),))
        return self._memo[key]

    def _causes(self, kind: Kind, v: int, step: int, write: bool = False) -> list[Expr] | None:
        """Whether each reader makes v started or needed; None if one has to be written out for that."""
        causes = []
        for w in self.problem.readers[v]:
            r = self.ranges[w]
            if r is None:
                continue
            if kind == "started" or not self.problem.candidates[w].fused:
                at = step if kind == "started" else step - 1
                if not write and r.first_min <= at < r.first_max and ("started", w, at) not in self._memo:
                    return None
                reason = self.started(w, at) if kind == "started" else ~self.started(w, at)
            else:
                if not write and r.last_min < step <= r.last_max and ("needed", w, step) not in self._memo:
                    return None
                reason = self.needed_from(w, step)
            causes.append(self.both(self._rebuilt(w), reason))
        return causes

    def write_out(self, v: int, step: int, decision: Decision) -> bool:
        """Tie the free columns behind v's expressions down, along what this decision rebuilds."""
        stack: list[tuple[Kind, int, int]] = [
            ("started", v, step),
            ("started", v, step - 1),
            ("needed", v, step),
        ]
        seen: set[tuple[Kind, int, int]] = set()
        written = False
        while stack:
            key = stack.pop()
            if key in seen or key not in self._memo:
                continue
            seen.add(key)
            kind, u, at = key
            column = self._open.pop(key, None)
            if column is not None:
                causes = self._causes(kind, u, at, write=True)
                assert causes is not None
                every = self._or(causes)
                self._bound([(column, 1), *((c, -k) for c, k in every.terms)], every.constant, every.constant)
                written = True
            for w in self.problem.readers[u]:
                if decision[w] == ABSENT:
                    if kind == "needed" and self.problem.candidates[w].fused:
                        stack.append(("needed", w, at))
                    else:
                        stack.append(("started", w, at - (kind == "needed")))
        return written

    def _rebuilt(self, v: int) -> Expr:
        return Expr(0, ((self.rebuild[v], 1),))

    def both(self, a: Expr, b: Expr) -> Expr:
        """1 where both are."""
        if ZERO in (a, b):
            return ZERO
        if a in (ONE, b):
            return b
        if b == ONE:
            return a
        key = ("and", a, b)
        if key not in self._memo:
            p = self._auxiliary()
            for side in (a, b):
                self._bound([(p, 1), *((c, -k) for c, k in side.terms)], -np.inf, side.constant)
            both = [(p, 1), *((c, -k) for c, k in (*a.terms, *b.terms))]
            self._bound(both, a.constant + b.constant - 1, np.inf)
            self._memo[key] = Expr(0, ((p, 1),))
        return self._memo[key]

    def covered(self, whole: Expr, parts: Sequence[Expr], spare: int = 0) -> None:
        """Add ``sum(parts) >= whole + spare``, once, for what every decision keeps to."""
        key = ("covered", spare, whole, *parts)
        if key in self._memo:
            return
        self._memo[key] = ZERO
        terms = [*((c, -k) for c, k in whole.terms), *(t for part in parts for t in part.terms)]
        low = whole.constant + spare - sum(part.constant for part in parts)
        self._bound(terms, low, np.inf)

    def _or(self, causes: Sequence[Expr]) -> Expr:
        causes = [c for c in dict.fromkeys(causes) if c != ZERO]
        if ONE in causes:
            return ONE
        if len(causes) < 2:
            return causes[0] if causes else ZERO
        p = self._auxiliary()
        for cause in causes:
            self._bound([(p, 1), *((c, -k) for c, k in cause.terms)], cause.constant, np.inf)
        every = [(p, 1), *((c, -k) for cause in causes for c, k in cause.terms)]
        self._bound(every, -np.inf, sum(c.constant for c in causes))
        return Expr(0, ((p, 1),))


def _ranges(problem: Problem) -> list[Range | None]:
    """Where the first and last needs of each value may lie; None if nothing can need it."""
    found: list[Range | None] = [None] * len(problem.candidates)
    for v in reversed(range(len(problem.candidates))):
        c = problem.candidates[v]
        readers = [
            (r, problem.candidates[w].fused) for w in problem.readers[v] if (r := found[w]) is not None
        ]
        if not c.reads and not readers:
            continue
        first_max = min(c.reads) if c.reads else max(r.first_max for r, _ in readers)
        last_min = (
            max(c.reads) if c.reads else min(r.last_min if fused else r.first_min for r, fused in readers)
        )
        found[v] = Range(
            first_min=min([*c.reads, *(r.first_min for r, _ in readers)]),
            first_max=first_max,
            last_min=last_min,
            last_max=max([*c.reads, *(r.last_max if fused else r.first_max for r, fused in readers)]),
        )
    return found
