"""Bytes as functions of dynamic sizes: held against plans that are made at those sizes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.functions import FloorDiv

from ciuic_compile import Plan, PlanFileError, SizeError, compat
from ciuic_compile.replay import FREE, Event, Joint, Trace
from ciuic_compile.report import from_json, render_text, to_json
from ciuic_compile.symbolic import PlanAt, SymbolicBytes, evaluate
from ciuic_compile.symbolize import Symbolizer, replayed
from ciuic_compile.workspace import Operand, workspaces
from tests.training import AttentionBlock, interpreted, step


def pooled() -> nn.Sequential:
    """Sizes of which half, rounded down, is left."""
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.SiLU())
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1))


def planned(model: nn.Module, x: Tensor, mode: str, dynamic: bool) -> Plan:
    """The plan of one step, which runs without generated code."""
    with interpreted(), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        (plan,) = step(model, [x], mode, dynamic=dynamic).plans
    return plan


def figures(plan: Plan | PlanAt) -> tuple[int, ...]:
    """Its four numbers of bytes."""
    return (
        plan.baseline_saved_bytes,
        plan.planned_saved_bytes,
        plan.baseline_peak_bytes,
        plan.planned_peak_bytes,
    )


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan of one attention block at 6 x 19."""
    torch.manual_seed(0)
    return planned(AttentionBlock(), torch.randn(6, 19, 64), "4:1", dynamic=True)


def same(first: Plan, there: Plan, sizes: Sequence[int]) -> None:
    """The first plan at these sizes is the other one, which was made there."""
    assert first.symbolic is not None, first.notes
    decisions = [[(d.action, d.codec, d.storage.op) for d in p.decisions] for p in (first, there)]
    assert decisions[0] == decisions[1], "another plan: this pair says nothing"
    at = first.at(**{s.name: size for s, size in zip(first.symbolic.symbols, sizes, strict=True)})
    assert figures(at) == figures(there) != figures(first)


@pytest.mark.parametrize(("batch", "length", "dynamic"), [(3, 7, False), (11, 35, True)])
def test_a_plan_at_another_size_is_what_is_planned_there(
    plan: Plan, batch: int, length: int, dynamic: bool
) -> None:
    there = planned(AttentionBlock(), torch.randn(batch, length, 64), "4:1", dynamic)
    same(plan, there, (length, batch))


def test_sizes_of_which_half_rounded_down_is_left() -> None:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3))
    model = nn.Sequential(*layers)
    first = planned(model, torch.randn(4, 3, 16, 17), "4:1", dynamic=True)
    assert first.symbolic is not None, first.notes
    known = {s.source: s.traced for s in first.symbolic.symbols}
    assert sorted(known.values()) == [4, 16, 17]
    there = planned(model, torch.randn(6, 3, 22, 19), "4:1", dynamic=False)
    same(first, there, [{4: 6, 16: 22, 17: 19}[s.traced] for s in first.symbolic.symbols])


def test_it_is_a_small_part_of_the_plans_file(plan: Plan) -> None:
    assert plan.symbolic is not None
    assert from_json(to_json(plan)) == plan
    assert plan.symbolic.planned_peak.terms[:2] == ("1", "s27*s77")
    assert len(plan.symbolic.planned_peak.rows) <= 12
    assert [(s.name, s.source, s.traced, s.least) for s in plan.symbolic.symbols] == [
        ("s27", "L['x'].size()[1]", 19, 2),
        ("s77", "L['x'].size()[0]", 6, 2),
    ]


def test_the_report_says_what_the_peak_grows_with(plan: Plan) -> None:
    (line,) = [row for row in render_text(plan).splitlines() if "sizes  " in row]
    assert "*s27*s77 at s27=19, s77=6" in line and "plan.at()" in line
    assert "s77 (L['x'].size()[0], 2 or more)" in render_text(plan, "full")


def test_targets_are_checked_at_the_size(plan: Plan) -> None:
    assert plan.at(s27=190, s77=60).holds
    budget = replace(plan, budget_bytes=plan.planned_peak_bytes)
    assert budget.at(s27=19, s77=6).holds
    over = budget.at(s27=190, s77=60)
    assert not over.holds
    need, have = (f"{n / 2**20:,.1f} MiB" for n in (over.planned_peak_bytes, plan.planned_peak_bytes))
    says = f"decisions no longer hold: peak {need} is over the budget {have} at s27=190, s77=60"
    assert str(over) == says
    assert plan.symbolic is not None
    saved = SymbolicBytes(
        ("1", *plan.symbolic.planned_saved.terms), ((9000, *plan.symbolic.planned_saved.rows[0]),)
    )
    fixed = replace(plan, mode="2:1", symbolic=replace(plan.symbolic, planned_saved=saved))
    assert fixed.at(s27=19, s77=6).holds
    assert "saved bytes are 0.97:1, short of 2:1 at s27=2, s77=2" in str(fixed.at(s27=2, s77=2))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"s27": 19, "s77": 6, "s78": 1}, "no size 's78'; did you mean 's77'?"),
        ({"s27": 19}, "needs a value for s77"),
        ({}, "needs a value for s27, s77"),
        ({"s27": 19, "s77": 1}, "s77=1 is out of range"),
        ({"s27": 19, "s77": -4}, "s77=-4 is out of range"),
        ({"s27": 19, "s77": 2.0}, "must be a whole number, not 2.0"),
        ({"s27": True, "s77": 2}, "must be a whole number, not True"),
    ],
)
def test_wrong_sizes(plan: Plan, sizes: dict[str, int], says: str) -> None:
    with pytest.raises(SizeError) as caught:
        plan.at(**sizes)
    assert says in str(caught.value)
    assert "s77 (L['x'].size()[0], 2 or more)" in str(caught.value), "what is valid"


def test_guards_and_upper_ends(plan: Plan) -> None:
    assert plan.symbolic is not None
    odd = replace(plan, symbolic=replace(plan.symbolic, guards=("Eq(Mod(s77, 2), 0)",)))
    assert odd.at(s27=19, s77=8)
    with pytest.raises(SizeError, match=r"s77=7 breaks Eq\(Mod\(s77, 2\), 0\)"):
        odd.at(s27=19, s77=7)
    symbols = tuple(replace(s, most=64) for s in plan.symbolic.symbols)
    with pytest.raises(SizeError, match="s77=65 is out of range"):
        replace(plan, symbolic=replace(plan.symbolic, symbols=symbols)).at(s27=64, s77=65)


def test_a_plan_of_fixed_sizes_has_no_others(plan: Plan) -> None:
    with pytest.raises(SizeError, match="compile with dynamic=True"):
        replace(plan, dynamic=False, symbolic=None).at(s77=3)
    with pytest.raises(SizeError, match="notes say why"):
        replace(plan, symbolic=None).at(s77=3)


# ---------------------------------------------------------------- terms and rows

X, Y = sympy.symbols("x y", integer=True, positive=True)
TERMS = (
    sympy.S.One,
    X,
    Y,
    X * Y,
    X**2 * Y,
    X - 1,
    FloorDiv(X * Y + 63, 64),
    FloorDiv(X, 2) ** 2,
    X * (Y - 1),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(TERMS), st.integers(1, 9), st.integers(-3, 3)), max_size=25),
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=4),
)
def test_no_row_that_is_the_largest_anywhere_is_dropped(
    changes: list[tuple[sympy.Expr, int, int]], sizes: list[tuple[int, int]]
) -> None:
    made = Symbolizer(ShapeEnv()).peak([[(compat.exact(t * n), count) for t, n, count in changes]])
    for x, y in sizes:
        values = [int((t * n).subs({X: x, Y: y})) * count for t, n, count in changes]
        assert made.at({"x": x, "y": y}) == max(accumulate(values, initial=0))


def test_rows_of_equal_layers_are_one() -> None:
    layers = [(X * 64, 1), (X * 16, 1), (X * 16, -1)] * 12
    made = Symbolizer(ShapeEnv()).peak([layers, [(X * 64, 12), (compat.exact(sympy.Integer(7)), 1)]])
    assert made == SymbolicBytes(("1", "x"), ((0, 784), (7, 768)))
    assert made.largest({"x": 2}) == ((784, "x"),)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("((x + 63)//64)", 2),
        ("x**2*y", 70 * 70 * 3),
        ("Mod(x, 4)", 2),
        ("ModularIndexing(x, 4, 5)", 2),
        ("Max(1, x - 69, y)", 3),
        ("x*y/2", 105),
        ("floor(x/4 + 1/2)", 18),
        ("ceiling(x/4)", 18),
        ("-x + 71", 1),
        ("Ne(x, 1)", True),
        ("x <= 69", False),
    ],
)
def test_terms(text: str, value: int) -> None:
    assert evaluate(text, {"x": 70, "y": 3}) == value


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "x.__class__", "z", "", "x/4", "9**9**9", "x**-1", "1.5", "'a'*9", "Max", "[x]",
     "(" * 500 + ")" * 500, "-" * 100_000 + "1", "x//0", "Max(x, key=x)", "x if y else 1", "\x00"],
)  # fmt: skip
def test_what_is_no_term_is_refused(text: str) -> None:
    with pytest.raises(PlanFileError, match="cannot evaluate the size"):
        evaluate(text, {"x": 70, "y": 3})


def test_a_deep_plan_is_evaluated_at_once(plan: Plan) -> None:
    """More rows and terms than 48 layers leave (bench/dynamic_shapes.py): far below 50 ms."""
    terms = ("1", "x", "y", "x*y", "x**2*y", "((x*y + 63)//64)", "((64*x*y + 63)//64)", "x*y**2")
    rows = tuple(tuple(i * j % 97 for j in range(len(terms))) for i in range(2000))
    assert plan.symbolic is not None
    symbols = tuple(replace(s, name=n) for s, n in zip(plan.symbolic.symbols, "xy", strict=True))
    big = SymbolicBytes(terms, rows)
    deep = replace(
        plan, symbolic=replace(plan.symbolic, symbols=symbols, planned_peak=big, baseline_peak=big,
                               baseline_saved=big, planned_saved=big),
    )  # fmt: skip
    start = time.process_time()
    deep.at(x=64, y=128)
    assert time.process_time() - start < 0.05


# ---------------------------------------------------------------- what torch keeps to itself


def dynamic(env: ShapeEnv, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A fake tensor whose first dimension is dynamic."""
    kinds = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (len(shape) - 1)]
    context = StatelessSymbolicContext(dynamic_sizes=kinds)
    fake = FakeTensorMode(shape_env=env).from_tensor(
        torch.empty(shape, dtype=dtype), symbolic_context=context
    )
    assert isinstance(fake, Tensor)
    return fake


@pytest.mark.parametrize(
    "op", ["aten._scaled_dot_product_flash_attention_backward.default", "aten.convolution.default"]
)
def test_temporaries_of_libraries_are_expressions_and_leave_no_guard(op: str) -> None:
    arguments = {"groups": 1, "transposed": False, "stride": [1, 1]}

    def taken(batch: Tensor, weight: Tensor) -> tuple[int, ...]:
        operands = [Operand(tuple(t.shape), t.stride(), 2) for t in (batch, weight)]
        if "attention" in op:
            operands = [operands[0]] * 3
        return workspaces(op, operands, operands[0], arguments)

    env, weight = ShapeEnv(), torch.empty(12, 12, 3, 3)
    batch = dynamic(env, 5, 12, 16, 16)
    before = len(env.guards)
    with compat.without_guards(env):
        (found,) = taken(batch, weight)
    assert len(env.guards) == before
    (symbol,) = compat.exact(found).free_symbols
    (there,) = taken(torch.empty(9, 12, 16, 16), weight)
    assert evaluate(str(compat.exact(found)), {str(symbol): 9}) == there != compat.hint(found)


@pytest.mark.parametrize("caches", [False, True])
def test_the_peak_of_inductors_allocations(plan: Plan, caches: bool) -> None:
    """A saved tensor of 40x bytes, a temporary of 100x, and a gradient of 1000 bytes; x is 6."""
    env = ShapeEnv()
    x = dynamic(env, 6, 64).shape[0]
    assert isinstance(x, torch.SymInt)
    size, n = compat.exact(x), 6
    forward = Trace((), ("loss", "kept"), (Event("loss", 4), Event("kept", 40 * n, size=40 * size)))
    temporary = (Event("t", 100 * n, size=100 * size), Event("t", FREE))
    backward = Trace(("kept",), ("g",), (*temporary, Event("g", 1000), Event("kept", FREE)))
    joint = Joint(2, 1, {"kept": 1}, {})
    assert plan.symbolic is not None
    symbols = compat.described(env, size)
    one = replace(plan.symbolic.symbols[0], name=str(size), traced=n, least=symbols[2])
    same = SymbolicBytes(("1",), ((plan.baseline_peak_bytes,),))
    symbolic = replace(
        plan.symbolic,
        symbols=(one,),
        baseline_saved=SymbolicBytes(("1",), ((plan.baseline_saved_bytes,),)),
        planned_saved=SymbolicBytes(("1",), ((plan.planned_saved_bytes,),)),
        baseline_peak=same,
    )

    def round_up(nbytes: int) -> int:
        return -(-nbytes // 512) * 512 if caches else nbytes

    def peak(n: int) -> int:
        return round_up(4) + round_up(40 * n) + max(round_up(100 * n), round_up(1000))

    beyond = 64 if caches else 0  # what the allocator left in blocks
    known = replace(plan, symbolic=symbolic, planned_peak_bytes=peak(n) + beyond)
    found = replayed(known, [x], forward, backward, joint, caches)
    assert found.symbolic is not None, found.notes
    for n in (2, 6, 9, 11, 400):
        assert found.at(**{str(size): n}).planned_peak_bytes == peak(n) + beyond
    if not caches:
        wrong = replayed(replace(known, planned_peak_bytes=5), [x], forward, backward, joint, caches)
        assert wrong.symbolic is None
        assert "known at the traced sizes only" in wrong.notes[-1]
