"""The planning problem as linear rows over 0/1 columns; peak rows are added step by step.

A candidate has one column for each store and one for being rebuilt. When a value's needs depend on what
else is rebuilt, 0/1 expressions say when it is alive (``lifetimes.py``). A row first carries the bytes
that are alive whatever those expressions are; where a step has few undecided values, or the simulator
disagrees, the exact product replaces them. Every stage is a relaxation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .lifetimes import ONE, Expr, Lifetimes
from .program import ABSENT, Decision, Problem

#: A row takes the exact form at once if at most this many of its values have undecided lifetimes.
_EXACT_AT_ONCE = 64


@dataclass
class PeakRow:
    """Bytes alive at one step: ``constant + sum(bytes * expression)``."""

    step: int
    exact: set[int] = field(default_factory=set)  # candidates whose exact terms it has


@dataclass(frozen=True)
class Rows:
    """``low <= matrix @ columns <= high``."""

    matrix: csr_array
    low: NDArray[np.float64]
    high: NDArray[np.float64]


class Relaxation:
    """Columns, structural rows and the peak rows added so far.

    Args:
        minimise_peak: the budget is a column (``peak_column``, in units of ``unit`` bytes), not a limit.
    """

    def __init__(self, problem: Problem, minimise_peak: bool = False, unit: int = 1) -> None:
        self.problem = problem
        self.stores: list[list[int]] = []
        self.rebuild: list[int] = []
        self.owner: list[int] = []
        self.choice: list[int] = []
        for v, c in enumerate(problem.candidates):
            self.stores.append([self._column(v, k) for k in range(len(c.stores))])
            self.rebuild.append(self._column(v, ABSENT) if c.rebuild is not None else -1)
        self.binaries = len(self.owner)
        self.columns = self.binaries
        self.unit = unit
        self.peak_column = self._auxiliary() if minimise_peak else -1
        self._rows: list[tuple[Sequence[int], Sequence[float], float, float]] = []
        self._peaks: dict[int, PeakRow] = {}
        self.lifetimes = Lifetimes(problem, self.rebuild, self._auxiliary, self._bound)
        self.ranges = self.lifetimes.ranges
        self._structure()
        self._static()

    def _column(self, v: int, choice: int) -> int:
        self.owner.append(v)
        self.choice.append(choice)
        return len(self.owner) - 1

    def _auxiliary(self) -> int:
        self.columns += 1
        return self.columns - 1

    def _row(self, terms: Iterable[tuple[int, float]], low: float, high: float) -> None:
        total: dict[int, float] = {}
        for column, k in terms:
            total[column] = total.get(column, 0.0) + k
        self._rows.append((list(total), list(total.values()), low, high))

    def _bound(self, terms: Sequence[tuple[int, int]], low: float, high: float) -> None:
        self._row([(column, float(k)) for column, k in terms], low, high)

    def present(self, v: int) -> list[int]:
        """The columns of which one is 1 if v is stored or rebuilt."""
        return self.stores[v] + ([self.rebuild[v]] if self.rebuild[v] >= 0 else [])

    def _structure(self) -> None:
        for v, c in enumerate(self.problem.candidates):
            mine = [(column, 1.0) for column in self.present(v)]
            readers = self.problem.readers[v]
            self._row(mine, 1.0 if c.reads else 0.0, 1.0)
            for w in readers:
                self._row([*mine, (self.rebuild[w], -1.0)], 0.0, np.inf)
            if not c.reads and mine:  # what nothing needs is dropped: no optimum does otherwise
                self._row([*mine, *((self.rebuild[w], -1.0) for w in readers)], -np.inf, 0.0)

    def limit(self, coefficients: NDArray[np.float64], bound: float) -> None:
        """Add ``coefficients @ binaries <= bound`` (both not negative), scaled to a right side of 1."""
        scaled = _scaled(coefficients, bound)
        used = np.flatnonzero(scaled)
        self._rows.append((used.tolist(), scaled[used].tolist(), -np.inf, 1.0 if bound > 0 else 0.0))

    def forbid(self, ones: Sequence[int], zeros: Sequence[int] = ()) -> None:
        """Cut off every point in which all of ``ones`` are 1 and all of ``zeros`` are 0."""
        self._row([*((c, 1.0) for c in ones), *((c, -1.0) for c in zeros)], -np.inf, len(ones) - 1.0)

    # -- what is alive whatever the undecided needs are

    def _static(self) -> None:
        """Fill ``constant`` (bytes at each step) and the static terms: column, bytes, first and last step."""
        problem, end = self.problem, self.problem.forward_steps - 1
        constant = np.zeros(problem.steps + 1, dtype=np.int64)
        terms: list[tuple[int, int, int, int]] = []
        self.undecided: list[int] = []
        for v, c in enumerate(problem.candidates):
            if not c.fused:
                constant[c.produced] += c.size
                constant[c.last_use + 1] -= c.size
            r = self.ranges[v]
            if r is None:
                continue
            if r.first_min < r.first_max or r.last_min < r.last_max:
                self.undecided.append(v)
            for k, column in enumerate(self.stores[v]):
                store = c.stores[k]
                if c.fused:
                    terms.append((column, c.size, c.produced, c.last_use))
                start = c.last_use + (store.codec is None)
                if not store.unpacked:
                    terms.append((column, store.nbytes, start, max(end, r.last_min)))
                    continue
                terms.append((column, store.nbytes, start, max(end, r.first_min)))
                # Between the earliest and the latest decode one of the two forms is alive.
                between = min(r.first_max - 1, r.last_min)
                terms.append((column, min(store.nbytes, c.size), r.first_min + 1, between))
                terms.append((column, c.size, r.first_max, r.last_min))
            if self.rebuild[v] >= 0 and not c.fused:
                terms.append((self.rebuild[v], c.size, r.first_max, r.last_min))
        terms = [t for t in terms if t[1] > 0 and t[2] <= t[3]]
        table = np.array(terms, dtype=np.int64).reshape(len(terms), 4)
        self._term_column, self._term_bytes = table[:, 0], table[:, 1]
        self._term_start, self._term_end = table[:, 2], table[:, 3]
        self.constant = np.asarray(problem.base, dtype=np.int64) + np.cumsum(constant[:-1])

    def static_bytes(self, step: int) -> NDArray[np.float64]:
        """Bytes of each 0/1 column at one step, undecided needs left out."""
        here = (self._term_start <= step) & (step <= self._term_end)
        found: NDArray[np.float64] = np.zeros(self.binaries)
        np.add.at(found, self._term_column[here], self._term_bytes[here])
        return found

    # -- peak rows

    def add_peak(self, step: int, decision: Decision | None = None) -> bool:
        """Add the row of a step, or the exact terms that this decision shows to be missing there.

        Returns:
            whether there was anything to add.
        """
        row, open_here = self._peaks.get(step), {v for v in self.undecided if self._open_at(v, step)}
        if row is None:
            exact = open_here if len(open_here) <= _EXACT_AT_ONCE else set[int]()
            self._peaks[step] = PeakRow(step, exact)
            return True
        if decision is None:
            return False
        written = [self.lifetimes.write_out(v, step, decision) for v in sorted(row.exact)]
        more = open_here > row.exact
        row.exact |= open_here
        return more or any(written)

    def _open_at(self, v: int, step: int) -> bool:
        r = self.ranges[v]
        assert r is not None
        return r.first_min <= step <= r.first_max or r.last_min < step <= r.last_max

    def _peak_terms(self, row: PeakRow) -> list[tuple[int, Expr]]:
        step = row.step
        here = (self._term_start <= step) & (step <= self._term_end)
        terms = [
            (int(size), Expr(0, ((int(column), 1),)))
            for column, size in zip(self._term_column[here], self._term_bytes[here], strict=True)
            if step < self.problem.forward_steps or self.owner[column] not in row.exact
        ]
        for v in sorted(row.exact):
            terms += self._exact_terms(v, step)
        return terms

    def _exact_terms(self, v: int, step: int) -> list[tuple[int, Expr]]:
        c, both, covered = self.problem.candidates[v], self.lifetimes.both, self.lifetimes.covered
        started, needed = self.lifetimes.started(v, step), self.lifetimes.needed_from(v, step)
        waiting = ~self.lifetimes.started(v, step - 1)
        stores = [(s, _column(column)) for s, column in zip(c.stores, self.stores[v], strict=True)]
        rebuilt = [_column(self.rebuild[v])] if self.rebuild[v] >= 0 else []
        kept = [(store.nbytes, mine) for store, mine in stores if not store.unpacked]
        encoded = [(store.nbytes, mine) for store, mine in stores if store.unpacked]
        kept_here = [both(mine, needed) for _, mine in kept]
        terms = [(size, here) for (size, _), here in zip(kept, kept_here, strict=True)]
        terms += [(size, both(mine, waiting)) for size, mine in encoded]
        whole = [*(mine for _, mine in encoded), *(rebuilt if not c.fused else [])]
        # What is needed is stored or rebuilt: tighter than the products alone where columns are fractions. An
        # expression that is 1 says only that the value is needed then if it is at all.
        certain = bool(c.reads)
        if certain or needed != ONE:
            covered(needed, [*kept_here, *(mine for _, mine in encoded), *rebuilt])
        if whole:
            alive = both(started, needed)
            here = both(Expr(0, tuple(term for mine in whole for term in mine.terms)), alive)
            terms.append((c.size, here))
            if certain or ONE not in (started, needed):
                covered(started, [alive, *(mine for _, mine in stores), *rebuilt, ~needed], 1)
            if certain or alive != ONE:
                covered(alive, [here, *(mine for _, mine in kept), *(rebuilt if c.fused else [])])
        return terms

    def _peak_row(self, row: PeakRow) -> tuple[list[int], list[float], float]:
        constant = int(self.constant[row.step])
        terms = self._peak_terms(row)
        total: dict[int, float] = {}
        if self.peak_column >= 0:
            scale, high = 1.0 / self.unit, -constant / self.unit
            total[self.peak_column] = -1.0
            clip = np.inf
        else:
            assert self.problem.budget is not None
            room = self.problem.budget - constant
            scale, high = (1.0 / room, 1.0) if room > 0 else (1.0, min(room, 0.0))
            clip = 2.0 if room > 0 else 1.0  # what does not fit alone needs no huge coefficient
        for size, expression in terms:
            k = min(size * scale, clip)
            high -= k * expression.constant
            for column, factor in expression.terms:
                total[column] = total.get(column, 0.0) + k * factor
        return list(total), list(total.values()), high

    def rows(self) -> Rows:
        """All rows so far."""
        peaks = [self._peak_row(row) for row in self._peaks.values()]  # may add auxiliary columns and rows
        every = [*self._rows, *((c, k, -np.inf, high) for c, k, high in peaks)]
        counts = [len(c) for c, _, _, _ in every]
        indices = np.fromiter((c for cs, _, _, _ in every for c in cs), dtype=np.int32, count=sum(counts))
        values = np.fromiter((k for _, ks, _, _ in every for k in ks), dtype=float, count=sum(counts))
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        matrix = csr_array((values, indices, starts), shape=(len(every), self.columns))
        return Rows(matrix, np.array([r[2] for r in every]), np.array([r[3] for r in every]))

    def decision(self, x: NDArray[np.float64]) -> Decision:
        """The choice with the largest column of each candidate."""
        found = []
        for v in range(len(self.problem.candidates)):
            values = {k: x[column] for k, column in enumerate(self.stores[v])}
            absent = 1.0 - sum(values.values())
            best = max(values, key=values.__getitem__, default=ABSENT)
            found.append(best if values and values[best] > absent else ABSENT)
        return tuple(found)


def _column(column: int) -> Expr:
    return Expr(0, ((column, 1),))


def _scaled(coefficients: NDArray[np.float64], bound: float) -> NDArray[np.float64]:
    if bound <= 0:
        return (coefficients > 0).astype(float)
    return np.minimum(coefficients / bound, 2.0)
