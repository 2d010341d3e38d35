"""A plan's bytes as functions of its dynamic sizes: plain data, evaluated without sympy or torch.

Every number of bytes is a sum of a few terms (``"s77"``, ``"(s77 + 63)//64"``) times whole numbers, and a
peak is the largest of a few such sums, one for each step that can be the worst. ``symbolize.py`` makes them.
The terms are text, because plans are files; they are parsed by Python's ``ast`` and evaluated node by node,
and nothing in them is ever executed.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

from .errors import PlanFileError, SizeError, nearest

if TYPE_CHECKING:
    from .types import Plan

_MIB = 2**20
_BINARY: Final[Mapping[type[ast.operator], Callable[[Any, Any], Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: Fraction,
    ast.Pow: lambda base, exponent: _power(base, exponent),
}
_COMPARED: Final[Mapping[type[ast.cmpop], Callable[[Any, Any], bool]]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
#: Functions of torch.utils._sympy.functions and of sympy that sizes and guards are made of.
_FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "ModularIndexing": lambda base, divisor, modulus: base // divisor % modulus,
    "PowByNatural": lambda base, exponent: _power(base, exponent),
    "floor": math.floor,
    "ceiling": math.ceil,
    "Eq": operator.eq,
    "Ne": operator.ne,
}
_MOST_POWER = 16


def _power(base: Any, exponent: Any) -> Any:
    if not isinstance(exponent, int) or not 0 <= exponent <= _MOST_POWER:
        raise ValueError(f"a power of {exponent}")
    return base**exponent


@functools.lru_cache(4096)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def evaluate(text: str, sizes: Mapping[str, int]) -> int | bool:
    """The whole number, or the truth, that an expression of sizes has.

    Raises:
        PlanFileError: it is not such an expression.
    """
    try:
        found = _evaluate(_parsed(text), sizes)
        if found != int(found):
            raise ValueError(f"{found} is no whole number")
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise PlanFileError(
            f"plan: cannot evaluate the size {text[:80]!r} ({error}); write the plan again"
        ) from error
    return found if isinstance(found, bool) else int(found)


def _evaluate(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluate(inner, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_evaluate(a, sizes) for a in args))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARED:
            return _COMPARED[type(op)](_evaluate(left, sizes), _evaluate(right, sizes))
    raise ValueError(f"{ast.unparse(node)[:40]} is not known")


@dataclass(frozen=True)
class Symbol:
    """One dynamic size.

    Attributes:
        name: as torch names it, e.g. ``"s77"``.
        source: where it comes from, e.g. ``"L['x'].size()[0]"``.
        traced: its value when the plan was made.
        least: torch compiles again for smaller ones.
        most: and for larger ones; None: there is no limit.
    """

    name: str
    source: str
    traced: int
    least: int
    most: int | None = None

    @property
    def range(self) -> str:
        """In words: ``"2 to 4096"``, ``"2 or more"``."""
        return f"{self.least} or more" if self.most is None else f"{self.least} to {self.most}"


@dataclass(frozen=True)
class SymbolicBytes:
    """The largest of some sums: each row times the terms. Sums that never are the largest are left out."""

    terms: tuple[str, ...]
    rows: tuple[tuple[int, ...], ...]

    def at(self, sizes: Mapping[str, int]) -> int:
        """Bytes at these sizes."""
        values = [evaluate(t, sizes) for t in self.terms]
        return max((sum(map(operator.mul, row, values)) for row in self.rows), default=0)

    def largest(self, sizes: Mapping[str, int]) -> tuple[tuple[int, str], ...]:
        """The sum that is the largest at these sizes: pairs of a number of bytes and what it is times."""
        values = [evaluate(t, sizes) for t in self.terms]
        row = max(self.rows, key=lambda r: sum(map(operator.mul, r, values)), default=())
        return tuple((n, t) for n, t in zip(row, self.terms, strict=False) if n)


@dataclass(frozen=True)
class SymbolicPlan:
    """What a plan with dynamic sizes needs at any of them: bytes as in the ``Plan``'s fields of that name.

    Attributes:
        guards: relations between sizes where torch compiles again if they do not hold.
    """

    symbols: tuple[Symbol, ...]
    guards: tuple[str, ...]
    baseline_saved: SymbolicBytes
    planned_saved: SymbolicBytes
    baseline_peak: SymbolicBytes
    planned_peak: SymbolicBytes

    @property
    def traced(self) -> dict[str, int]:
        """The sizes that the plan was made at."""
        return {s.name: s.traced for s in self.symbols}


@dataclass(frozen=True)
class PlanAt:
    """A plan at other sizes than it was made at; bytes as in ``Plan``.

    Attributes:
        sizes: pairs of a symbol's name and its value.
        broken: what was reached at the traced sizes and is not at these, in sentences.
    """

    sizes: tuple[tuple[str, int], ...]
    baseline_saved_bytes: int
    planned_saved_bytes: int
    baseline_peak_bytes: int
    planned_peak_bytes: int
    broken: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether ratio and budget are still met."""
        return not self.broken

    @property
    def ratio(self) -> float:
        """Baseline over planned saved bytes; ``inf`` when nothing is saved any more."""
        if self.planned_saved_bytes == 0:
            return 1.0 if self.baseline_saved_bytes == 0 else math.inf
        return self.baseline_saved_bytes / self.planned_saved_bytes

    def __str__(self) -> str:
        """One line: the figures, or what no longer holds."""
        if self.broken:
            return f"decisions no longer hold: {'; '.join(self.broken)} at {_named(self.sizes)}"
        peaks = f"peak {_mib(self.planned_peak_bytes)} (Inductor {_mib(self.baseline_peak_bytes)})"
        saved = f"saved {_mib(self.planned_saved_bytes)} (Inductor {_mib(self.baseline_saved_bytes)})"
        return f"decisions hold at {_named(self.sizes)}: {peaks}, {saved}"


def plan_at(plan: Plan, sizes: Mapping[str, int]) -> PlanAt:
    """:meth:`ciuic_compile.types.Plan.at`."""
    symbolic = plan.symbolic
    if symbolic is None:
        why = (
            "is of graphs whose sizes cannot be written as expressions (its notes say why)"
            if plan.dynamic
            else "is of fixed sizes; compile with dynamic=True for one that holds at others"
        )
        raise SizeError(f"the plan of {plan.name or 'this graph'} {why}")
    _check(symbolic, sizes)
    found = PlanAt(
        tuple((s.name, sizes[s.name]) for s in symbolic.symbols),
        symbolic.baseline_saved.at(sizes),
        symbolic.planned_saved.at(sizes),
        symbolic.baseline_peak.at(sizes),
        symbolic.planned_peak.at(sizes),
        (),
    )
    broken = []
    if plan.mode.endswith(":1"):
        ratio = float(plan.mode[:-2])
        met = plan.planned_saved_bytes <= int(plan.baseline_saved_bytes / ratio)
        if met and found.planned_saved_bytes > int(found.baseline_saved_bytes / ratio):
            broken.append(f"saved bytes are {found.ratio:.2f}:1, short of {plan.mode}")
    if plan.budget_bytes is not None and found.planned_peak_bytes > plan.budget_bytes:
        peak = _mib(found.planned_peak_bytes)
        broken.append(f"peak {peak} is over the budget {_mib(plan.budget_bytes)}")
    return PlanAt(**{**found.__dict__, "broken": tuple(broken)})


def _check(symbolic: SymbolicPlan, sizes: Mapping[str, int]) -> None:
    """Raise SizeError unless these are sizes that the compiled graph runs at."""
    known = {s.name: s for s in symbolic.symbols}
    listed = ", ".join(f"{s.name} ({s.source or 'an input'}, {s.range})" for s in symbolic.symbols)
    valid = f"\n  valid: {listed or 'none'}"
    for name, value in sizes.items():
        if name not in known:
            raise SizeError(f"the plan has no size {name!r}{nearest(name, known)}{valid}")
        if isinstance(value, bool) or not isinstance(value, int):
            raise SizeError(f"size {name} must be a whole number, not {value!r}{valid}")
    missing = [name for name in known if name not in sizes]
    if missing:
        raise SizeError(f"the plan needs a value for {', '.join(missing)}{valid}")
    again = f"this graph was not compiled for that: torch compiles, and plans, anew{valid}"
    for name, symbol in known.items():
        if sizes[name] < symbol.least or (symbol.most is not None and sizes[name] > symbol.most):
            raise SizeError(f"{name}={sizes[name]} is out of range: {again}")
    for guard in symbolic.guards:
        if not evaluate(guard, sizes):
            raise SizeError(f"{_named(tuple(sizes.items()))} breaks {guard}: {again}")


def _named(sizes: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sizes)


def _mib(nbytes: int) -> str:
    return f"{nbytes / _MIB:,.1f} MiB"
