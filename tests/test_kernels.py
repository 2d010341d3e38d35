"""Which values Inductor is expected to compute in one kernel, on graphs written by hand."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from ciuic_compile.capture import owner
from ciuic_compile.kernels import Loop, by_last_value, loop_of
from ciuic_compile.schedule import in_kernels, output_nodes, stored_values
from tests.stages import HandMade

aten = torch.ops.aten
ROWS, COLUMNS = 8192, 1024


class Made(HandMade):
    """Values of ROWS x COLUMNS elements; ``x`` is an input, a library's call is a product of two of them."""

    def __init__(self, rows: int = ROWS, columns: int = COLUMNS) -> None:
        super().__init__()
        self.x = self.placeholder("primals_1", rows, columns)
        self.square = self.placeholder("primals_2", columns, columns)

    def mm(self, a: fx.Node) -> fx.Node:
        return self.call(aten.mm.default, a, self.square)

    def sin(self, a: fx.Node) -> fx.Node:
        return self.call(aten.sin.default, a)

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self.call(aten.add.Tensor, a, b)

    def sum(self, a: fx.Node, *dims: int) -> fx.Node:
        return self.call(aten.sum.dim_IntList, a, list(dims), True)

    def kernels(self, *outputs: fx.Node) -> list[set[fx.Node]]:
        graph = self.output(*outputs)
        return [set(k) for k in in_kernels(stored_values(graph, {owner(n) for n in output_nodes(graph)}))]


def test_what_shares_most_is_fused_first() -> None:
    """A layer norm made again: with the gradient, which reads more of the same, not where it is computed."""
    made = Made()
    shared, more = made.mm(made.x), made.mm(made.x)
    again = made.sin(made.add(made.x, shared))
    product = made.mm(again)
    normed = made.add(again, more)
    gradient = made.add(made.add(made.mm(product), normed), more)
    kernels = made.kernels(product, again, normed, gradient)
    assert {normed, gradient} in kernels and {again} in kernels


def test_rows_are_summed_where_their_elements_are_computed() -> None:
    made = Made()
    product = made.mm(made.x)
    total = made.sum(product, 1)
    scaled = made.add(product, total)
    assert {total, scaled} in made.kernels(scaled, total)


def test_columns_are_not_summed_with_elementwise_values() -> None:
    made = Made()
    product = made.mm(made.x)
    total = made.sum(product, 0)
    assert {total} in made.kernels(made.sin(product), total)


def test_rows_and_columns_of_a_large_matrix_are_summed_together() -> None:
    for rows, together in ((ROWS, True), (ROWS // 4, False)):
        made = Made(rows)
        product = made.mm(made.x)
        sums = made.sum(product, 1), made.sum(product, 0)
        assert (set(sums) in made.kernels(*sums)) is together


def test_what_rows_and_columns_are_computed_from_stays_outside() -> None:
    made = Made()
    product = made.mm(made.x)
    value = made.sin(product)
    sums = made.sum(value, 1), made.sum(value, 0)
    last = made.add(value, sums[0])
    assert made.kernels(value, *sums, last)[-2:] == [{value}, {*sums, last}]


def test_sums_of_columns_of_two_layers_run_together() -> None:
    """They share more than with their own layer's rows, whose shared elements count, not bytes."""
    made = Made()
    product = made.mm(made.x)
    columns = made.sum(product, 0)
    rows = made.sum(product, 1)
    other = made.sum(made.add(product, rows), 0)
    kernels = made.kernels(columns, rows, other)
    assert {columns, other} in kernels and {rows} in kernels


def test_sums_of_a_few_are_computed_where_they_are_read() -> None:
    for few, inside in ((7, True), (8, False)):
        made = Made()
        total = made.sum(made.placeholder("primals_3", ROWS, few), 1)
        last = made.mm(made.add(made.x, total))
        assert ({total} not in made.kernels(last)) is inside
        assert loop_of(total, ROWS) == (Loop(ROWS, ROWS) if inside else Loop(ROWS, few * ROWS, True, True))


def test_loops_of_reductions() -> None:
    made = Made(16, 12)
    image = made.placeholder("primals_3", 2, 3, 4, 4)
    last, first = made.sum(made.x, -1), made.sum(made.x, 0)
    channel, whole = made.sum(image, 0, 2, 3), made.call(aten.sum.default, made.x)
    assert loop_of(last, 0) == Loop(16, 192, True, True)
    assert loop_of(first, 0) == Loop(12, 192, True, False)
    assert loop_of(channel, 0) == Loop(3, 96, True, False)
    assert loop_of(whole, 0) == Loop(1, 192, True, False)
    assert loop_of(made.sum(image, 2, 3), 0) == Loop(6, 96, True, True)
    assert loop_of(made.sin(made.x), 192) == Loop(192, 192)
    assert loop_of(made.mm(made.x), 0) is None


def test_dynamic_sizes_are_taken_at_the_examples_and_leave_no_guard() -> None:
    made = Made()
    env = made.mode.shape_env
    assert env is not None
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
    x = made.mode.from_tensor(torch.empty(ROWS, COLUMNS), symbolic_context=context)
    made.x.meta["val"] = x
    product = made.mm(made.x)
    sums = made.sum(product, 1), made.sum(product, 0)
    halves = made.placeholder("primals_3", 1)
    with made.mode:
        halves.meta["val"] = torch.empty(x.shape[0] // 2, 2, COLUMNS)
    halved = made.sum(halves, 1, 2)
    before = len(env.guards)
    half = loop_of(halved, 0)
    assert set(sums) in made.kernels(*sums)
    assert half is not None and half.rows and half.hints[0] == ROWS // 2
    assert len(env.guards) == before


def test_sizes_that_depend_on_data_are_no_error() -> None:
    made = Made()
    with made.mode:
        env = made.mode.shape_env
        assert env is not None
        made.x.meta["val"] = torch.empty(env.create_unbacked_symint(), COLUMNS)
    rows, columns = (loop_of(made.sum(made.x, d), 0) for d in (1, 0))
    assert rows is not None and rows.rows and columns is not None and not columns.rows


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=25)
)
def test_every_value_is_made_once_and_after_what_it_needs(steps: list[tuple[int, int, int]]) -> None:
    made = Made()
    values = [made.x]
    for kind, a, b in steps:
        first, second = values[a % len(values)], values[b % len(values)]
        new = (
            made.mm(first) if kind == 0
            else made.sin(first) if kind == 1
            else made.add(first, second) if kind == 2
            else made.add(first, made.sum(second, kind - 3))
        )  # fmt: skip
        values.append(new)
    graph = made.output(*values[1:])
    stored = stored_values(graph, {owner(n) for n in output_nodes(graph)})
    own = in_kernels(stored)
    for kernels in (own, by_last_value(own, stored)):
        assert sorted(n.name for k in kernels for n in k) == sorted(n.name for n in stored)
        place = {n: i for i, k in enumerate(kernels) for n in k}
        for node, read in stored.items():
            assert all(place[s] <= place[node] for s in read if s in place)


def test_a_kernel_of_two_layers_waits_for_the_later_one() -> None:
    """In Inductor's own order it pulls what it needs before the products that are ready, as in a Llama."""
    made = Made()
    first = made.sum(made.mm(made.x), 0)
    ready = made.mm(made.sin(made.x))
    late = made.mm(made.x)
    total = made.add(first, made.sum(late, 0))
    graph = made.output(ready, total)
    stored = stored_values(graph, {owner(n) for n in output_nodes(graph)})
    own = in_kernels(stored)
    for kernels, waits in ((own, False), (by_last_value(own, stored), True)):
        order = [node for kernel in kernels for node in kernel]
        assert (order.index(ready) < order.index(late)) is waits
