"""The planning problem as linear rows over 0/1 columns; peak rows are added step by step.

A candidate has one column for each store and one for being rebuilt. When a value's needs depend on what
else is rebuilt, 0/1 expressions say when it is alive (``lifetimes.py``). A row first carries the bytes
that are alive whatever those expressions are; where a step has few undecided values, or the simulator
disagrees, the exact product replaces them. Every stage is a relaxation.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from .lifetimes import ONE, Expr, Lifetimes
from .program import ABSENT, Decision, Problem

Floats = NDArray[np.float64]

#: A row takes the exact form at once if at most this many of its values have undecided lifetimes.
_EXACT_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Terms:
    """Summands of a row, ``bytes * expression`` each: the expressions' columns lie one after the other."""

    nbytes: Floats
    constants: Floats
    counts: NDArray[np.int64]
    columns: NDArray[np.int32]
    factors: Floats

    @classmethod
    def of(cls, terms: Sequence[tuple[int, Expr]]) -> Terms:
        """The terms of these summands."""
        every = [term for _, expression in terms for term in expression.terms]
        return cls(
            np.array([size for size, _ in terms], dtype=float),
            np.array([e.constant for _, e in terms], dtype=float),
            np.array([len(e.terms) for _, e in terms], dtype=np.int64),
            np.array([column for column, _ in every], dtype=np.int32),
            np.array([factor for _, factor in every], dtype=float),
        )


@dataclass
class PeakRow:
    """Bytes alive at one step: ``constant + sum(bytes * expression)``."""

    step: int
    exact: set[int] = field(default_factory=set)  # candidates whose exact terms it has
    terms: Terms | None = None  # as long as ``exact`` is what it was


@dataclass(frozen=True)
class Rows:
    """``low <= matrix @ columns <= high``.

    Attributes:
        a_byte: by how much a byte more of budget raises each row's ``high``.
    """

    matrix: csr_array
    low: Floats
    high: Floats
    a_byte: Floats


class Table:
    """Rows added one by one, laid out as ``scipy.sparse`` wants them."""

    def __init__(self) -> None:
        self.columns, self.values, self.starts = array("i"), array("d"), array("i", [0])
        self.low, self.high = array("d"), array("d")

    def add(self, terms: Mapping[int, float], low: float, high: float) -> None:
        """Add ``low <= terms <= high``."""
        self.columns.extend(terms)
        self.values.extend(terms.values())
        self.close(low, high)

    def close(self, low: float, high: float) -> None:
        """End a row whose columns and values are there."""
        self.starts.append(len(self.columns))
        self.low.append(low)
        self.high.append(high)

    def __len__(self) -> int:
        return len(self.low)


class Relaxation:
    """Columns, structural rows and the peak rows added so far. Its rows hold under any budget.

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
        self._table = Table()
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
        self._table.add(total, low, high)

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

    def static_bytes(self, step: int) -> Floats:
        """Bytes of each 0/1 column at one step, undecided needs left out."""
        here = (self._term_start <= step) & (step <= self._term_end)
        found: Floats = np.zeros(self.binaries)
        np.add.at(found, self._term_column[here], self._term_bytes[here])
        return found

    def static_live(self, x: Floats) -> Floats:
        """Bytes at each step where columns are fractions, undecided needs left out."""
        change = np.zeros(len(self.constant) + 1)
        taken = self._term_bytes * x[self._term_column]
        np.add.at(change, self._term_start, taken)
        np.add.at(change, self._term_end + 1, -taken)
        return np.asarray(self.constant + np.cumsum(change[:-1]), dtype=np.float64)

    def lacking(self, steps: Iterable[int]) -> list[int]:
        """Those of these steps that have no row."""
        return [t for t in steps if t not in self._peaks]

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
        if more:
            row.exact, row.terms = row.exact | open_here, None
        return more or any(written)

    def _open_at(self, v: int, step: int) -> bool:
        r = self.ranges[v]
        assert r is not None
        return r.first_min <= step <= r.first_max or r.last_min < step <= r.last_max

    def _terms(self, row: PeakRow) -> Terms:
        if row.terms is None:
            row.terms = Terms.of(self._peak_terms(row))
        return row.terms

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

    def _peak_row(self, row: PeakRow, terms: Terms, budget: int | None, table: Table) -> float:
        """Write a row down; by how much a byte more of budget raises its ``high``."""
        constant = int(self.constant[row.step])
        if self.peak_column >= 0:
            scale, high, clip = 1.0 / self.unit, -constant / self.unit, np.inf
            table.columns.append(self.peak_column)
            table.values.append(-1.0)
        else:
            assert budget is not None
            room = budget - constant
            scale, high = (1.0 / room, 1.0) if room > 0 else (1.0, min(room, 0.0))
            clip = 2.0 if room > 0 else 1.0  # what does not fit alone needs no huge coefficient
        k = np.minimum(terms.nbytes * scale, clip)
        table.columns.frombytes(terms.columns.tobytes())
        table.values.frombytes((np.repeat(k, terms.counts) * terms.factors).tobytes())
        table.close(-np.inf, high - float(k @ terms.constants))
        return scale

    def rows(self, budget: int | None, more: Table | None = None) -> Rows:
        """All rows so far, under a budget, and some more."""
        written = [(row, self._terms(row)) for row in self._peaks.values()]  # may add columns and rows
        peaks, rest = Table(), more or Table()
        scales = [self._peak_row(row, terms, budget, peaks) for row, terms in written]
        every = (self._table, rest, peaks)
        starts, offset = [np.zeros(1, dtype=np.int32)], 0
        for table in every:
            starts.append(np.array(table.starts[1:], dtype=np.int32) + offset)
            offset += len(table.columns)
        data = np.concatenate([np.array(t.values) for t in every])
        indices = np.concatenate([np.array(t.columns, dtype=np.int32) for t in every])
        shape = (sum(map(len, every)), self.columns)
        matrix = csr_array((data, indices, np.concatenate(starts)), shape=shape)
        matrix.sum_duplicates()
        low, high = (np.concatenate([np.array(getattr(t, side)) for t in every]) for side in ("low", "high"))
        a_byte = np.zeros(shape[0])
        a_byte[shape[0] - len(peaks) :] = scales
        return Rows(matrix, low, high, a_byte)

    def decision(self, x: Floats) -> Decision:
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
