"""The peak model on graphs whose peaks are counted by hand, in units of one 64 x 64 fp32 tensor."""

from __future__ import annotations

import operator

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import fx, nn

from ciuic_compile.simulate import Peaks, saved_storages, simulate, tensor_bytes
from tests.stages import HandMade, by_name, stage

aten = torch.ops.aten
UNIT = 64 * 64 * 4


class Made(HandMade):
    """``mm``, ``sin`` and so on for 64 x 64 values; ``x`` and ``w`` are inputs, which cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.w = self.placeholder("primals_1", 64, 64), self.placeholder("primals_2", 64, 64)

    def mm(self, a: fx.Node, b: fx.Node | None = None) -> fx.Node:
        return self.call(aten.mm.default, a, b or self.w)

    def sin(self, a: fx.Node) -> fx.Node:
        return self.call(aten.sin.default, a)

    def add(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self.call(aten.add.Tensor, a, b)

    def forward_peak(self, *outputs: fx.Node) -> float:
        """Peak of the graph so far as a forward that returns these, in units."""
        return simulate(self.output(*outputs), nothing(), len(outputs)).forward / UNIT


def nothing() -> fx.Graph:
    """A backward that does nothing."""
    return HandMade().output(None)


def test_inputs_cost_nothing() -> None:
    made = Made()
    assert made.forward_peak(made.x) == 0


def test_a_chain_of_matmuls_holds_two() -> None:
    made = Made()
    assert made.forward_peak(made.mm(made.mm(made.mm(made.x)))) == 2


def test_fused_pointwise_values_cost_nothing_and_the_last_reuses_its_input() -> None:
    made = Made()
    a = made.mm(made.x)
    pointwise = made.sin(made.sin(made.sin(a)))  # one kernel, in place of a
    assert made.forward_peak(made.mm(pointwise)) == 2


def test_no_reuse_while_the_input_is_still_needed() -> None:
    made = Made()
    a = made.mm(made.x)
    assert made.forward_peak(made.mm(made.mm(made.sin(a)), a)) == 3


def test_a_matmul_never_works_in_place() -> None:
    made = Made()
    a = made.mm(made.x)
    assert made.forward_peak(made.mm(a, a)) == 2


def test_a_fused_value_keeps_its_input_until_its_consumer_runs() -> None:
    made = Made()
    a = made.mm(made.x)
    late = made.sin(a)  # runs inside the add, so a lives until then
    b = made.mm(made.mm(made.x))
    # a, then the inner matmul's result, then the outer's
    assert made.forward_peak(made.add(late, b)) == 3


def test_views_cost_nothing_and_keep_their_base() -> None:
    made = Made()
    a = made.mm(made.x)
    view = made.call(aten.permute.default, a, [1, 0])
    b = made.mm(made.mm(made.x))  # a, and two of b's
    assert made.forward_peak(made.mm(b, view)) == 3


def test_outputs_live_to_the_end() -> None:
    made = Made()
    a = made.mm(made.x)
    b = made.mm(a)
    c = made.mm(b)
    assert made.forward_peak(a, b, made.mm(c)) == 4


def test_an_output_through_a_view_lives_to_the_end() -> None:
    made = Made()
    a = made.mm(made.x)
    view = made.call(aten.permute.default, a, [1, 0])
    assert made.forward_peak(view, made.mm(made.mm(made.x))) == 3


def test_a_reduction_is_stored_and_does_not_reuse_a_bigger_buffer() -> None:
    made = Made()
    a = made.mm(made.x)
    row = made.call(aten.sum.dim_IntList, made.sin(a), [1], True)
    assert made.forward_peak(row) == 1 + 1 / 64, "only a buffer of its own size is written in place"
    made = Made()
    a = made.mm(made.x)
    row = made.call(aten.sum.dim_IntList, made.sin(a), [1], True)
    assert made.forward_peak(made.add(a, row), row) == 1 + 1 / 64


def test_a_reduction_that_only_its_kernel_reads_has_no_buffer() -> None:
    made = Made()
    a = made.mm(made.x)
    row = made.call(aten.sum.dim_IntList, made.sin(a), [1], True)
    assert made.forward_peak(made.add(a, row)) == 1, "a row is summed and added over itself"


def test_each_result_of_a_reduction_lives_until_it_is_read_itself() -> None:
    made = Made()
    a = made.mm(made.x)
    both = made.call(aten.var_mean.correction, a, [1], correction=0, keepdim=True)
    variance = made.call(operator.getitem, both, 0)  # nobody reads the mean
    b = made.mm(a, made.call(aten.expand.default, variance, [64, 64]))
    assert made.forward_peak(made.add(b, variance), a) == 2 + 1 / 64


def test_gradients_of_a_convolution_go_one_by_one() -> None:
    """The image's is read at once, the weights' is returned; there is none for a bias."""
    made = HandMade()
    image, weight = made.placeholder("primals_1", 1, 64, 8, 8), made.placeholder("primals_2", 64, 64, 1, 1)
    dy = made.call(aten.sin.default, image)
    call = aten.convolution_backward.default
    pair = [[1, 1], [0, 0], [1, 1], False, [0, 0], 1]
    both = made.call(call, dy, image, weight, None, *pair, [True, True, False])
    of_image, of_weight = (made.call(operator.getitem, both, i) for i in (0, 1))
    again = made.call(call, of_image, image, weight, None, *pair, [True, False, False])
    last = made.call(operator.getitem, again, 0)
    peak = simulate(made.output(last, of_weight), nothing(), 2).forward
    assert peak == (4 + 4 + 4) * UNIT // 4, "dy and both gradients, or both images' and the weights'"


def test_a_gradient_of_three_slices_is_one_buffer() -> None:
    """What the backward of ``q, k, v = qkv.unbind()`` adds up: Inductor writes each slice in its place."""
    made = Made()
    parts = [made.mm(made.x) for _ in "qkv"]
    total = None
    for index, part in enumerate(parts):
        zeros = made.call(aten.full.default, [3, 64, 64], 0.0)
        wide = made.call(aten.select_scatter.default, zeros, part, 0, index)
        total = wide if total is None else made.add(total, wide)
    assert total is not None
    flat = made.call(aten.view.default, made.call(aten.clone.default, total), [192, 64])
    assert made.forward_peak(made.mm(flat)) == 3 + 3, "the three parts, and then all of it"


def test_an_overwritten_input_needs_no_buffer() -> None:
    made = Made()
    made.call(aten.copy_.default, made.x, made.sin(made.w))
    assert made.forward_peak(made.w) == 0


def backward_of(*saved: tuple[str, int]) -> tuple[HandMade, list[fx.Node], fx.Node]:
    """A backward with these saved tensors (name, rows) and one tangent."""
    made = HandMade()
    received = [made.placeholder(name, rows, 64) for name, rows in saved]
    return made, received, made.placeholder("tangents_1", 64, 64)


def test_saved_tensors_are_freed_after_their_last_use() -> None:
    made = Made()
    a = made.mm(made.x)
    b = made.mm(a)
    forward = made.output(made.mm(b), a, b, made.x)
    there, (saved_a, saved_b), t = backward_of((a.name, 64), (b.name, 64))
    g = there.call(aten.mm.default, t, saved_b)
    h = there.call(aten.mm.default, g, saved_a)
    last = there.call(aten.mm.default, h, t)
    got = simulate(forward, there.output(last), 1)
    # output and tangent all along (2); then a, b, g; then a, g, h (b is free); then h and last
    assert got == Peaks(saved=2 * UNIT, forward=3 * UNIT, backward=(2 + 3) * UNIT)
    assert got.peak == 5 * UNIT


def test_a_saved_tensor_that_nobody_reads_still_arrives() -> None:
    """And nothing is written over it, since no kernel has it."""
    made = Made()
    a = made.mm(made.x)
    forward = made.output(made.mm(a), a)
    there, _, t = backward_of((a.name, 64))
    got = simulate(forward, there.output(there.call(aten.sin.default, t)), 1)
    assert (got.saved, got.backward) == (UNIT, (2 + 2) * UNIT)


def test_early_decodes_cost_more_than_late_ones() -> None:
    """Three saved vectors, each expanded to a matrix: all at the start, or one at a time."""

    def backward(early: bool) -> fx.Graph:
        there, rows, t = backward_of(("a", 1), ("b", 1), ("c", 1))
        ones = there.placeholder("primals_1", 64, 1)
        g, wide = t, []
        for row in rows:
            if early:
                wide.append(there.call(aten.mm.default, ones, row))
        for index, row in enumerate(rows):
            decoded = wide[index] if early else there.call(aten.mm.default, ones, row)
            g = there.call(aten.mm.default, g, decoded)
        return there.output(g)

    made = Made()
    row = [made.call(aten.sum.dim_IntList, made.mm(made.x), [0], True) for _ in "abc"]
    for node, name in zip(row, "abc", strict=True):
        node.name = name
    forward = made.output(made.x, *row)
    # the tangent; then g and three matrices, or g, one matrix, their product and the last vector
    early, late = (simulate(forward, backward(flag), 1).backward for flag in (True, False))
    assert early == (1 + 4) * UNIT
    assert late == (1 + 3) * UNIT + 64 * 4


def test_a_librarys_call_takes_its_temporaries_beside_its_result() -> None:
    """A convolution on a GPU whose operands lie plain: cuDNN copies all three."""
    made = HandMade()
    image, weight = (
        made.placeholder("primals_1", 4, 128, 16, 16),
        made.placeholder("primals_2", 128, 128, 3, 3),
    )
    call = made.call(aten.convolution.default, image, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    for node in (image, weight, call):
        value = node.meta["val"]
        with made.mode:
            strides = torch.empty(value.shape, device="meta").stride()
            node.meta["val"] = torch.empty_strided(value.shape, strides, dtype=torch.half, device="cuda")
    output, copies = 2 * 4 * 128 * 256, 2 * (2 * 4 * 128 * 256 + 128 * 128 * 9)
    graph = made.output(call)
    assert simulate(graph, nothing(), 1).forward == output, "Inductor lays the channels last"
    with inductor_config.patch(layout_optimization=False):
        assert simulate(graph, nothing(), 1).forward == output + copies


def test_storages_that_several_saved_views_share_count_once() -> None:
    made = Made()
    a = made.mm(made.x)
    views = [made.call(aten.slice.Tensor, a, 0, i, i + 32) for i in (0, 32)]
    input_view = made.call(aten.permute.default, made.x, [1, 0])
    forward = made.output(made.mm(a), *views, input_view, made.w)
    assert by_name(saved_storages(forward, 1)) == {views[0].name}


def test_bytes() -> None:
    assert tensor_bytes(torch.empty(3, 5, dtype=torch.bfloat16)) == 30
    assert tensor_bytes((torch.empty(2), [torch.empty(3, dtype=torch.bool)])) == 11
    assert tensor_bytes(7) == tensor_bytes(None) == 0
    found = stage(
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(48, 8), dynamic=True
    )
    (first, _) = found.nodes(aten.addmm)
    assert isinstance(first.meta["val"].shape[0], torch.SymInt)
    assert tensor_bytes(first.meta["val"]) == 48 * 8 * 4


@pytest.mark.parametrize("mode", ["4:1", "lossless"])
def test_baseline_of_a_model(mode: str) -> None:
    """Four linear layers with GELU: the hidden values are saved, whatever the mode."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    found = stage(model, torch.randn(64, 64), mode=mode)
    # Inductor keeps each hidden value and its GELU: two units a layer
    assert found.baseline.saved == sum(found.model.baseline.values()) == 4 * UNIT
    assert found.baseline.forward == (4 + 1) * UNIT
