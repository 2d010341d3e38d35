"""From what appears and goes while graphs run to a plan's bytes as functions of its dynamic sizes.

Every size is an expression of torch's symbols. It is split into terms times whole numbers; what is alive
after each change is one row of such numbers; and a row is dropped where another one is never smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import sympy
from numpy.typing import NDArray
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv

from . import compat
from .allocator import ROUND
from .analyze import MemoryModel
from .codecs.base import Size
from .errors import PlanFileError
from .replay import Joint, Trace, replay
from .simulate import Change, Peaks, exact_bytes
from .symbolic import Symbol, SymbolicBytes, SymbolicPlan, evaluate
from .types import Plan

Matrix = NDArray[np.int64]
_FIXED = "the plan's bytes are known at the traced sizes only"


class NoExpression(Exception):
    """Why some bytes cannot be written as an expression of the sizes."""


def symbolized(
    plan: Plan, model: MemoryModel, baseline: Peaks, planned: Peaks, saved: Sequence[fx.Node], added: int
) -> Plan:
    """The plan with its bytes as functions of the dynamic sizes, or a note why they cannot be written so.

    Args:
        baseline: peaks of Inductor's own partition.
        planned: peaks of the rewritten graphs, the plan's correction included.
        saved: the storages that the rewritten forward saves.
        added: bytes of fixed size that torch saves beside what any partition asks for.
    """
    env = compat.shape_env(n.meta.get("val") for n in model.captured.graph.find_nodes(op="placeholder"))
    if env is None:
        return plan
    before = (model.original or model).baseline
    try:
        made = Symbolizer(env).plan(
            [*map(exact_bytes, before), added],
            [exact_bytes(n) for n in saved],
            baseline.changes,
            planned.changes,
        )
        made = replace(made, planned_peak=raised(made.planned_peak, plan.correction_bytes))
        _check(made, plan)
    except NoExpression as error:
        return replace(plan, notes=(*plan.notes, f"{_FIXED}: {error}"))
    return replace(plan, symbolic=made)


def narrowed(plan: Plan, inputs: Sequence[object]) -> Plan:
    """The plan with the ranges and guards that its sizes have once Inductor has compiled the graphs."""
    env = compat.shape_env(inputs)
    if plan.symbolic is None or env is None:
        return plan
    names = [s.name for s in plan.symbolic.symbols]
    found = {str(s): s for s in env.var_to_range}
    symbols, guards = Symbolizer(env).limits([found[name] for name in names])
    return replace(plan, symbolic=replace(plan.symbolic, symbols=symbols, guards=guards))


def replayed(
    plan: Plan, inputs: Sequence[object], forward: Trace, backward: Trace, joint: Joint, caches: bool
) -> Plan:
    """The plan with its peak as an expression of what Inductor's own code allocates.

    Args:
        caches: the device's allocator rounds. What it hands out beyond that depends on what it has in its
            cache: added are as many bytes as at the traced sizes.
    """
    env = compat.shape_env(inputs)
    if plan.symbolic is None or env is None:
        return plan
    recorder = _Recorder(ROUND if caches else 1)
    replay(_exact(forward), _exact(backward), replace(joint, tangents=joint.sizes), recorder, steps=1)
    try:
        made = replace(plan.symbolic, planned_peak=Symbolizer(env).peak([recorder.changes]))
        if caches:
            beyond = plan.planned_peak_bytes - _at_traced(made, made.planned_peak)
            made = replace(made, planned_peak=raised(made.planned_peak, beyond))
        _check(made, plan)
    except NoExpression as error:
        return replace(plan, symbolic=None, notes=(*plan.notes, f"{_FIXED}: {error}"))
    return replace(plan, symbolic=made)


class _Recorder:
    """An allocator that only writes down what is asked of it."""

    def __init__(self, multiple: int) -> None:
        self.allocated = self.peak_allocated = self.reserved = 0
        self.changes: list[Change] = []
        self._multiple = multiple

    def alloc(self, nbytes: Size) -> int:
        if self._multiple > 1:
            nbytes = FloorDiv(nbytes + self._multiple - 1, self._multiple) * self._multiple
        self.changes.append((compat.exact(nbytes), 1))
        return len(self.changes) - 1

    def free(self, handle: int) -> None:
        self.changes.append((self.changes[handle][0], -1))


def _exact(trace: Trace) -> Trace:
    """The trace with its dynamic sizes as expressions, without what libraries keep from the first step on."""
    events = (e for e in trace.events if not e.lasting)
    sized = (e if e.size is None else replace(e, nbytes=e.size) for e in events)
    return replace(trace, events=tuple(sized))


@dataclass(frozen=True)
class Symbolizer:
    """Writes bytes as functions of the sizes of one compilation."""

    env: ShapeEnv

    def plan(
        self,
        baseline_saved: Sequence[Size],
        planned_saved: Sequence[Size],
        baseline_peak: Sequence[Sequence[Change]],
        planned_peak: Sequence[Sequence[Change]],
    ) -> SymbolicPlan:
        """All of a plan's bytes.

        Args:
            baseline_saved: sizes of what Inductor would save.
            planned_saved: sizes of what the plan saves.
            baseline_peak: what appears and goes in each graph under Inductor's own partition.
            planned_peak: the same under the plan.

        Raises:
            NoExpression: a size depends on data.
        """
        four = (
            self.peak([[(s, 1) for s in baseline_saved]]),
            self.peak([[(s, 1) for s in planned_saved]]),
            self.peak(baseline_peak),
            self.peak(planned_peak),
        )
        sizes = (s for part in (*baseline_peak, *planned_peak) for s, _ in part)
        symbols = self._symbols((*sizes, *baseline_saved, *planned_saved))
        return SymbolicPlan(*self.limits(symbols), *four)

    def peak(self, parts: Sequence[Sequence[Change]]) -> SymbolicBytes:
        """The most that is alive after any change, each part counted from nothing."""
        split = {size: self._terms(size) for part in parts for size, _ in part}
        terms = sorted({t for found in split.values() for t in found}, key=_key)
        column = {t: i for i, t in enumerate(terms)}
        alive = [_alive(part, split, column) for part in parts]
        rows = np.unique(np.concatenate([np.zeros((1, len(terms)), np.int64), *alive]), axis=0)
        fixed = np.array([not compat.is_nonnegative(self.env, t) for t in terms], dtype=bool)
        rows = _undominated(rows, fixed)
        used = [i for i in range(len(terms)) if rows[:, i].any()]
        kept = tuple(tuple(int(n) for n in row[used]) for row in rows)
        return SymbolicBytes(tuple(str(terms[i]) for i in used), kept)

    def _terms(self, size: Size) -> dict[sympy.Expr, int]:
        """``size`` as a sum of terms times whole numbers."""
        if isinstance(size, int):
            return {sympy.S.One: size} if size else {}
        found: dict[sympy.Expr, int] = {}
        for term, factor in sympy.expand(size).as_coefficients_dict().items():
            whole = (term, int(factor)) if factor.is_Integer else (term * factor, 1)
            found[whole[0]] = found.get(whole[0], 0) + whole[1]
        return found

    def _symbols(self, sizes: Iterable[Size]) -> list[sympy.Symbol]:
        free = {s for size in set(sizes) if not isinstance(size, int) for s in size.free_symbols}
        return sorted(free, key=_key)

    def limits(self, symbols: Sequence[sympy.Symbol]) -> tuple[tuple[Symbol, ...], tuple[str, ...]]:
        found = []
        for symbol in symbols:
            source, traced, least, most = compat.described(self.env, symbol)
            if traced is None:
                raise NoExpression(f"the size {symbol} depends on data")
            found.append(Symbol(str(symbol), source, traced, least, most))
        guards = compat.guards(self.env, set(symbols))
        return tuple(found), tuple(guard for guard in guards if _readable(guard, found))


def _check(made: SymbolicPlan, plan: Plan) -> None:
    """Raise NoExpression unless the bytes come to the plan's at the sizes of the example."""
    for name in ("baseline_saved", "planned_saved", "baseline_peak", "planned_peak"):
        found, expected = _at_traced(made, getattr(made, name)), getattr(plan, f"{name}_bytes")
        if found != expected:
            raise NoExpression(f"{name} is {found} bytes as an expression, {expected} as planned")


def _at_traced(made: SymbolicPlan, part: SymbolicBytes) -> int:
    try:
        return part.at(made.traced)
    except PlanFileError as error:
        raise NoExpression(str(error)) from error


def raised(made: SymbolicBytes, nbytes: int) -> SymbolicBytes:
    """The same with a fixed number of bytes more."""
    if not nbytes:
        return made
    terms = made.terms if "1" in made.terms else ("1", *made.terms)
    at = terms.index("1")
    rows = made.rows if "1" in made.terms else tuple((0, *row) for row in made.rows)
    return SymbolicBytes(terms, tuple((*row[:at], row[at] + nbytes, *row[at + 1 :]) for row in rows))


def _key(expression: sympy.Expr) -> tuple[bool, int, str]:
    """The order of terms: the constant, then by length and text, whatever the order of hashes."""
    return not expression.is_number, len(str(expression)), str(expression)


def _readable(guard: str, symbols: Sequence[Symbol]) -> bool:
    try:
        return bool(evaluate(guard, {s.name: s.traced for s in symbols}))
    except PlanFileError:
        return False


def _alive(
    part: Sequence[Change], split: Mapping[Size, Mapping[sympy.Expr, int]], column: Mapping[sympy.Expr, int]
) -> Matrix:
    """One row a change: how often each term counts once it is made."""
    change = np.zeros((len(part), len(column)), np.int64)
    for row, (size, count) in zip(change, part, strict=True):
        for term, factor in split[size].items():
            row[column[term]] += factor * count
    return np.cumsum(change, axis=0)


def _undominated(rows: Matrix, fixed: NDArray[np.bool_]) -> Matrix:
    """The rows of which no other is at least as large in every term; of ``fixed`` ones, equal."""
    kept = np.zeros((0, rows.shape[1]), np.int64)
    for row in rows[np.argsort(-rows.sum(axis=1), kind="stable")]:  # what is larger comes first
        covers = (kept >= row).all(axis=1) & (kept == row)[:, fixed].all(axis=1)
        if not covers.any():
            kept = np.vstack([kept, row])
    return kept
