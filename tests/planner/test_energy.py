"""Guessed sizes of the backward's values, where the guess is exact or has an obvious order."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ciuic_compile.energy import Energy
from ciuic_compile.planner.error_model import ErrorModel, group_of
from tests.stages import HandMade, Stage, stage
from tests.training import AttentionBlock

aten = torch.ops.aten


def test_products_sums_and_reductions() -> None:
    made = HandMade()
    x, w, t = (made.placeholder(n, 8, 16) for n in ("primals_1", "primals_2", "tangents_1"))
    y = made.call(aten.mul.Tensor, x, w)
    a = made.call(aten.mul.Tensor, t, 3.0)
    b = made.call(aten.add.Tensor, a, t)
    c = made.call(aten.sum.dim_IntList, t, [1], True)
    d = made.call(aten.mean.dim, t, [1], True)
    e = made.call(aten.expand.default, c, [8, 16])
    f = made.call(aten.sub.Tensor, made.call(aten.mul.Tensor, t, 16), e)
    g = made.call(aten.div.Scalar, f, 4)
    captured = made.captured([y], [b, made.call(aten.add.Tensor, g, d)])
    energy = Energy(captured, made.model(captured).classes)
    found = [energy.of(n) for n in (t, a, b, c, d, e, f, g)]
    assert found == pytest.approx([1, 9, 10, 16, 1 / 16, 16, 256 - 16, 15])
    assert energy.total(c) == 16 * 8


def backward_sub(found: Stage) -> list[fx.Node]:
    """Differences that only the backward computes."""
    nodes = found.captured.graph.find_nodes(op="call_function", target=aten.sub.Tensor)
    return [n for n in nodes if found.captured.is_backward(n)]


@pytest.mark.parametrize("width", [16, 64, 256])
def test_a_norm_hands_on_little_error_of_what_it_normalizes(width: int) -> None:
    """Its backward corrects the gradient by a width-th of its energy; errors in that count as much."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 8))
    found = stage(model, torch.randn(64, width))
    assert backward_sub(found)
    saved = list(found.selection.saved)
    lossy = [n for n in found.model.storages_of(saved) if found.model.classes.kept_because(n) is None]
    model_of = ErrorModel(found.captured, found.model.classes, saved)
    errors = dict(
        zip(
            (tuple(n.meta["val"].shape) for n in found.captured.bwd_outputs),
            model_of.gradient_errors(dict.fromkeys(lossy, 1e-4)),
            strict=True,
        )
    )
    assert errors[width, width] == pytest.approx((2e-4 / (width - 2)) ** 0.5, rel=0.4)
    assert errors[8, width] == pytest.approx(1e-2, rel=0.01)


def test_taking_the_mean_away_does_not_add_to_a_value() -> None:
    """Else what batch norm corrects by counts four times, and over four elements takes everything away."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)]
    found = stage(nn.Sequential(nn.Conv2d(3, 8, 1), *layers), torch.randn(2, 3, 4, 4))
    energy = Energy(found.captured, found.model.classes)
    outer = [n for n in backward_sub(found) if n.all_input_nodes[0] in backward_sub(found)]
    assert outer
    for node in outer:  # dy - xhat * mean(dy * xhat) - mean(dy), over 32 elements
        inner = node.all_input_nodes[0]
        dy = energy.of(inner.all_input_nodes[0])
        assert energy.of(inner) == pytest.approx(dy * (1 - 1 / 32), rel=0.01)
        assert energy.of(node) == pytest.approx(dy * (1 - 2 / 32), rel=0.01)


def test_a_size_among_the_arguments_of_a_view_is_no_value() -> None:
    """Every view of a dynamic batch squared it once more: plans of 16 blocks were no longer finite."""
    torch.manual_seed(0)
    model, x = AttentionBlock(), torch.randn(6, 19, 64)
    found = [stage(model, x, dynamic=dynamic) for dynamic in (True, False)]
    both = [ErrorModel(f.captured, f.model.classes, list(f.selection.saved)).coefficients() for f in found]
    values = [sorted(v for v in coefficients.values() if v) for coefficients in both]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_symbolic_sizes_count_at_their_hints() -> None:
    """A mean is a sum divided by a size, which is a node of the graph where the size is dynamic."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))
    model(x := torch.randn(4, 3, 12, 12))
    totals, coefficients = [], []
    for dynamic in (True, False):
        found = stage(model, x, dynamic=dynamic)
        model_of = ErrorModel(found.captured, found.model.classes, list(found.selection.saved))
        totals.append([model_of._energy.total(n) for n in found.captured.bwd_outputs])
        coefficients.append(sorted(v for v in model_of.coefficients().values() if v))
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    assert coefficients[0] == pytest.approx(coefficients[1], rel=1e-6)


def attention_written_out(layers: int) -> Stage:
    """Blocks whose attention no kernel fuses: matmul, softmax, matmul."""
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        return stage(nn.Sequential(*(AttentionBlock() for _ in range(layers))), torch.randn(2, 96, 64))


def test_a_softmax_written_out_hands_on_no_more_than_a_fused_attention() -> None:
    """Rows of n probabilities add up to 1: taken for ones, they made each gradient n times the one behind."""
    written = attention_written_out(3)
    fused = stage(nn.Sequential(*(AttentionBlock() for _ in range(3))), torch.randn(2, 96, 64))
    assert not any(written.model.classes._attention_operands.values())
    assert any(fused.model.classes._attention_operands.values())
    shares = []
    for found in (written, fused):
        energy = Energy(found.captured, found.model.classes)
        totals = [energy.total(n) for n in found.captured.bwd_outputs if n.op != "placeholder"]
        shares.append([t / totals[-1] for t in totals])
    for mine, reference in zip(*shares, strict=True):
        assert reference / 8 < mine < reference * 8, "it was 2400 times as much"


def test_what_attention_written_out_reads_is_calibrated_by_itself() -> None:
    found = attention_written_out(1)
    groups = {
        tuple(n.meta["val"].shape): group_of(found.model.classes, n)
        for n in found.model.storages_of(found.selection.saved)
        if found.model.codecs(n)
    }
    assert groups[2, 4, 96, 96] == "activation/probabilities"
    assert (
        groups[2, 4, 96, 16] == groups[2, 4, 16, 96] == "linear_input/factor"
    )  # queries or values, and keys
    assert groups[2, 96, 4, 16] == "linear_input", "attention's output, which a linear layer reads"
    assert groups[192, 128] == "activation", "what GELU reads"
