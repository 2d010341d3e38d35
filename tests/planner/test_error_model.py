"""Predicted gradient errors: a linear map, its derivative, and what is measured on linear layers."""

from __future__ import annotations

from math import sqrt
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from ciuic_compile.calibration import GraphCalibration
from ciuic_compile.codecs import get_codec
from ciuic_compile.passes import default_passes, run_pipeline
from ciuic_compile.planner import error_model
from ciuic_compile.planner.error_model import ErrorModel
from ciuic_compile.types import TensorClass
from tests.stages import HandMade, Stage, differ, run_pair, stage

aten = torch.ops.aten


@pytest.fixture(scope="module")
def mlp() -> Stage:
    """Norm, skip connection, GELU: contractions, sums, statistics and rebuilt values."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    model = nn.Sequential(nn.Linear(16, 16), Block(), Block(), nn.Linear(16, 16))
    return stage(model, torch.randn(8, 4, 16))


def errors_of(found: Stage) -> tuple[ErrorModel, list[fx.Node]]:
    """The model of the chosen cut, and the saved nodes that an error can start in."""
    saved = list(found.selection.saved)
    model = ErrorModel(found.captured, found.model.classes, saved)
    lossy = [n for n in found.model.storages_of(saved) if found.model.codecs(n)]
    assert len(lossy) >= 3
    return model, lossy


def weighted(model: ErrorModel, found: list[float]) -> float:
    """Variance of the whole gradient, given that of each part."""
    assert sum(model.weights) == pytest.approx(1) and min(model.weights) > 0
    return sum(w * v for w, v in zip(model.weights, found, strict=True))


def variances(model: ErrorModel, mse: dict[fx.Node, float]) -> list[float]:
    """Squared relative error of each gradient."""
    return [e * e for e in model.gradient_errors(mse)]


def test_no_error_in_no_error_out(mlp: Stage) -> None:
    model, lossy = errors_of(mlp)
    assert set(model.gradient_errors({})) == {0.0}
    assert set(model.gradient_errors(dict.fromkeys(lossy, 0.0))) == {0.0}


@settings(max_examples=20, deadline=None)
@given(st.data(), st.floats(1e-6, 10.0))
def test_linear(mlp: Stage, data: st.DataObject, factor: float) -> None:
    model, lossy = errors_of(mlp)
    amounts = st.lists(st.floats(0, 1e-2), min_size=len(lossy), max_size=len(lossy))
    a = dict(zip(lossy, data.draw(amounts), strict=True))
    b = dict(zip(lossy, data.draw(amounts), strict=True))
    both = {n: a[n] + factor * b[n] for n in lossy}
    expected = [x + factor * y for x, y in zip(variances(model, a), variances(model, b), strict=True)]
    assert variances(model, both) == pytest.approx(expected, rel=1e-9, abs=1e-18)


def test_coefficients_are_the_derivative_of_the_whole_gradients_squared_error(mlp: Stage) -> None:
    model, lossy = errors_of(mlp)
    coefficients = model.coefficients()
    step = 1e-3
    with mock.patch.dict(error_model.GAIN, {TensorClass.ACTIVATION: 0.5, TensorClass.LINEAR_INPUT: 2.0}):
        gained = model.coefficients()
        for node in lossy:
            found = variances(model, {node: step})
            assert gained[node] == pytest.approx(weighted(model, found) / step, rel=1e-9)
    for node in lossy:
        found = variances(model, {node: step})
        assert coefficients[node] == pytest.approx(weighted(model, found) / step, rel=1e-9)
        assert coefficients[node] > 0
    assert any(gained[n] != coefficients[n] for n in lossy), "gains matter, so this test can fail"


def test_exact_values_carry_no_error_into_a_sum() -> None:
    """The terms of a sum share its energy; terms that are always exact are not counted among them."""
    made = HandMade()
    x, w, t = (made.placeholder(n, 8, 8) for n in ("primals_1", "primals_2", "tangents_1"))
    a = made.call(aten.mm.default, x, w)
    b = made.call(aten.mm.default, a, w)
    lossy_sum = made.call(aten.add.Tensor, a, b)
    exact_sum = made.call(aten.add.Tensor, a, made.call(aten.sin.default, x))
    gradients = [made.call(aten.mul.Tensor, t, lossy_sum), made.call(aten.mul.Tensor, t, exact_sum)]
    captured = made.captured([made.call(aten.mm.default, b, w)], gradients)
    model = ErrorModel(captured, made.model(captured).classes, [a, b])
    assert variances(model, {a: 0.04}) == pytest.approx([0.02, 0.04])
    assert variances(model, {a: 0.04, b: 0.02}) == pytest.approx([0.03, 0.04])


def test_uses_of_one_parameter_add_up() -> None:
    """Whichever use has the larger gradient, its error is not diluted by the other."""
    made = HandMade()
    x, w, t = (made.placeholder(n, 8, 8) for n in ("primals_1", "primals_2", "tangents_1"))
    a = made.call(aten.mm.default, x, w)
    b = made.call(aten.mm.default, a, w)
    large = made.call(aten.mm.default, t, b)
    small = made.call(aten.mm.default, made.call(aten.mul.Tensor, t, 1e-3), a)
    captured = made.captured(
        [made.call(aten.mm.default, b, w)], [None, made.call(aten.add.Tensor, large, small)]
    )
    model = ErrorModel(captured, made.model(captured).classes, [a, b])
    assert variances(model, {a: 0.04, b: 0.01}) == pytest.approx([0.05])


def measured_and_predicted(found: Stage, codec: str) -> tuple[list[float], list[float]]:
    """Relative errors of the gradients with every legal storage in ``codec``."""
    saved = [n for n in found.model.storages_of(found.selection.saved) if codec in names(found, n)]
    assert saved
    graphs = found.graphs()
    run_pipeline(graphs, default_passes({n.name: codec for n in saved}))
    (_, exact), (_, lossy) = (run_pair(g, found.inputs[0]) for g in (found.graphs(), graphs))
    pairs = [(a, b) for a, b in zip(exact, lossy, strict=True) if a is not None]
    model = ErrorModel(found.captured, found.model.classes, list(found.selection.saved))
    mse = get_codec(codec).relative_mse
    return differ(*zip(*pairs, strict=True)), model.gradient_errors(dict.fromkeys(saved, mse))


def names(found: Stage, node: fx.Node) -> set[str]:
    """Codecs on offer."""
    return {c.name for c in found.model.codecs(node)}


@pytest.mark.parametrize(
    "codec", ["int8_group64", "int6_group64", "int5_group64", "int4_group64", "int4_group64_affine"]
)
def test_linear_layers_as_measured_within_a_factor_of_two(codec: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    found = stage(model, torch.randn(512, 64))
    measured, predicted = measured_and_predicted(found, codec)
    assert sum(m > 0 for m in measured) == 3, "the first layer's input is exact, biases need no activation"
    for m, p in zip(measured, predicted, strict=True):
        assert p / 2 <= m <= p * 2 if p else m == 0
    whole = [sqrt(sum(e * e for e in side) / len(side)) for side in (measured, predicted)]
    assert whole[0] / 2 <= whole[1] <= whole[0] * 2


def test_gelu_layers_as_measured_within_a_factor_of_three() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(64, 64), nn.GELU())]
    found = stage(nn.Sequential(*layers, nn.Linear(64, 64)), torch.randn(512, 64))
    measured, predicted = measured_and_predicted(found, "int4_group64_affine")
    whole = [sqrt(sum(e * e for e in side) / len(side)) for side in (measured, predicted)]
    assert whole[0] / 3 <= whole[1] <= whole[0] * 3


def test_a_calibration_sets_shares_and_gains_but_loosens_no_bound(mlp: Stage) -> None:
    guessed, lossy = errors_of(mlp)
    shares = tuple(1 / len(guessed.weights) for _ in guessed.weights)
    mse = dict.fromkeys(lossy, 1e-4)

    def measured(gain: float) -> ErrorModel:
        kinds = {error_model.group_of(mlp.model.classes, n): gain for n in lossy}
        known = GraphCalibration(shares, kinds, {})
        return ErrorModel(mlp.captured, mlp.model.classes, list(mlp.selection.saved), known)

    quarter, four = measured(0.25), measured(4.0)
    assert quarter.weights == list(shares) != guessed.weights
    assert variances(quarter, mse) == pytest.approx([v / 4 for v in variances(guessed, mse)])
    assert quarter.bound(mse) == guessed.bound(mse)
    assert four.bound(mse) == pytest.approx(2 * guessed.bound(mse))
    for node in lossy:
        found = weighted(quarter, variances(quarter, {node: 1e-3})) / 1e-3
        assert quarter.coefficients(quarter.weights)[node] == pytest.approx(found)
    assert all(c > w for c, w in zip(quarter.cautious, quarter.weights, strict=True))
    assert guessed.cautious == guessed.weights


def test_measured_codec_errors_take_the_place_of_the_gaussian_ones(mlp: Stage) -> None:
    _, lossy = errors_of(mlp)
    codec = get_codec("int8_group64")
    group = error_model.group_of(mlp.model.classes, lossy[0])
    known = GraphCalibration((1.0,), {}, {group: {codec.name: 0.5}})
    classes = mlp.model.classes
    assert error_model.relative_mse(classes, lossy[0], codec, known) == 0.5
    assert error_model.relative_mse(classes, lossy[0], codec) == codec.relative_mse
    assert error_model.relative_mse(classes, lossy[0], get_codec("int4_group64"), known) < 0.1


def test_an_operand_may_be_there_twice() -> None:
    """Positions among operands are those of the arguments, for a convolution as for an attention."""

    def function(x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(x)
        return torch.nn.functional.conv2d(torch.nn.functional.scaled_dot_product_attention(x, x, x), x)

    found = stage(function, torch.randn(2, 2, 8, 8, requires_grad=True))
    attention = next(n for n in found.captured.graph.nodes if error_model.is_attention_backward(n))
    shares = error_model._of_output(attention, 0)
    assert shares[attention.args[4]] == error_model.OUTPUT_TO_SCORES  # the attention's output

    compiled = torch.compile(lambda x: torch.nn.functional.conv2d(x.tanh(), x.tanh()), backend="ciuic")
    compiled(torch.randn(2, 2, 8, 8, requires_grad=True)).sum().backward()
