"""Unusual graphs through capture, cut, codecs and passes, against eager: everything but code generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ciuic_compile
from ciuic_compile.types import Action, TensorClass
from tests.training import (
    Lambda,
    Step,
    compiled,
    convnet,
    errors,
    interpreted,
    kernel_cache,
    mlp,
    only_kernels_cached,
    rows,
    step,
    weighted_sum,
)

__all__ = ["kernel_cache"]
ROUNDING = 5e-6


@pytest.fixture(autouse=True)
def inductor_cache(kernel_cache: Path) -> Iterator[Path]:
    torch.manual_seed(0)
    with only_kernels_cached(kernel_cache) as folder, interpreted():
        yield folder


class Scaled(torch.autograd.Function):
    """Saves an input, an intermediate and a number; returns a new tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(x) * y
        ctx.save_for_backward(h, y, x)
        ctx.factor = 2.0
        return h * ctx.factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        _, y, x = ctx.saved_tensors
        t = torch.tanh(x)
        return gradient * y * (1 - t * t) * ctx.factor, gradient * t * ctx.factor


class Stash(torch.autograd.Function):
    """Keeps a tensor on the context itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.h = torch.tanh(x)
        return ctx.h * 3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3 * (1 - ctx.h**2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = (
            nn.Embedding(50, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 50, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(F.gelu(self.mix(self.embed(ids))))


class Counting(nn.Module):
    """Mutates its buffers in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64)
        self.register_buffer("mean", torch.ones(64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        h = self.mix(x)
        self.mean.mul_(0.9).add_(h.detach().mean(0))
        self.seen += 1
        return self.mix((h * self.mean).tanh()) * self.mean


def in_place(layers: nn.ModuleList, x: Tensor) -> Tensor:
    h = layers[0](x).relu_()
    y = layers[1](h)
    y.add_(1).tanh_()
    z = y.clone()
    z[:, 3:9] = layers[2](y)[:, 3:9] * 2
    z[0] = 0
    return layers[2](z)


def overwrites_its_input(layers: nn.ModuleList, x: Tensor) -> Tensor:
    x.mul_(2)
    return layers[2]((layers[2](x) * x).tanh())


def views_of_one_storage(layers: nn.ModuleList, x: Tensor) -> Tensor:
    h = layers[0](x)
    a, b = h.chunk(2, 1)
    return layers[2](a * b.sigmoid()) + layers[2](h[:, 10:74]).exp()


def saved_twice(layers: nn.ModuleList, x: Tensor) -> Tensor:
    h = layers[2](x)
    v = h.view(-1, 8)
    return layers[2]((v * v).view_as(h)) + (h @ h.t()).sum(1, keepdim=True)


def not_dense(layers: nn.ModuleList, x: Tensor) -> Tensor:
    h = layers[0](x)
    return layers[2](h[:, ::2] * h[:, 1::2]) + layers[2](h.t()[:64].t().exp().log1p())


def complex_views(layers: nn.ModuleList, x: Tensor) -> Tensor:
    z = torch.view_as_complex(layers[0](x).view(-1, 64, 2))
    return layers[0]((z * z.exp()).real)


def fourier(layers: nn.ModuleList, x: Tensor) -> Tensor:
    z = torch.fft.rfft(layers[2](x))
    return layers[2](torch.fft.irfft(z * z.conj(), n=64))


def branches(layers: nn.ModuleList, x: Tensor) -> Tensor:
    h = layers[2](x)
    h = torch.cond(h.sum() > 0, lambda a: (a * 2).tanh(), lambda a: a.sin() * a, (h,))
    return layers[2](h * h)


@torch.compiler.nested_compile_region
def region(h: Tensor) -> Tensor:
    return (h * 2).tanh() * h


def checkpointed(layers: nn.ModuleList, x: Tensor, p: float = 0.0) -> Tensor:
    def block(y: Tensor) -> Tensor:
        return F.dropout(layers[1](F.dropout(F.gelu(layers[0](y)), p)), p)

    for _ in range(2):
        x = x + checkpoint(block, x, use_reentrant=False)
    return layers[2](x)


def half_frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


GRAPHS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "input gradients": (mlp, lambda: [rows().requires_grad_()]),
    "one row": (mlp, lambda: [rows(1)]),
    "no rows": (mlp, lambda: [rows(0)]),
    "double": (lambda: mlp().double(), lambda: [rows().double()]),
    "frozen parameters": (half_frozen, lambda: [rows()]),
    "tied embedding": (Tied, lambda: [torch.randint(0, 50, (5, 9))]),
    "tied and transposed": (
        lambda: Lambda(lambda m, x: F.linear(F.gelu(m[0](x)), m[0].weight.t())),
        lambda: [rows()],
    ),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)),
        lambda: [rows()],
    ),
    "mutated buffers": (Counting, lambda: [rows()]),
    "in-place": (lambda: Lambda(in_place), lambda: [rows()]),
    "overwritten input": (lambda: Lambda(overwrites_its_input), lambda: [rows()]),
    "custom function": (
        lambda: Lambda(lambda m, x: m[2](Scaled.apply(m[2](x), m[1](m[0](x))))),
        lambda: [rows()],
    ),
    "stashing function": (lambda: Lambda(lambda m, x: m[2](Stash.apply(m[1](m[0](x))))), lambda: [rows()]),
    "views of one storage": (lambda: Lambda(views_of_one_storage), lambda: [rows()]),
    "saved twice": (lambda: Lambda(saved_twice), lambda: [rows()]),
    "not dense": (lambda: Lambda(not_dense), lambda: [rows()]),
    "complex": (lambda: Lambda(complex_views), lambda: [rows()]),
    "fourier": (lambda: Lambda(fourier), lambda: [rows()]),
    "tangent not contiguous": (
        lambda: Lambda(lambda m, x: m[2](F.gelu(m[2](x))).t()),
        lambda: [rows()],
    ),
    "cond": (lambda: Lambda(branches), lambda: [rows()]),
    "nested regions": (lambda: Lambda(lambda m, x: m[2](region(region(m[2](x))))), lambda: [rows()]),
    "vmap": (
        lambda: Lambda(lambda m, x: torch.vmap(lambda r: m[2](m[2](r).tanh() * r))(x)),
        lambda: [rows()],
    ),
    "func.grad": (
        lambda: Lambda(lambda m, x: m[2](x * torch.func.grad(lambda y: m[2](y).tanh().sum())(x))),
        lambda: [rows()],
    ),
    "checkpoint": (lambda: Lambda(checkpointed), lambda: [rows()]),
    "indices and masks": (
        lambda: Lambda(lambda m, x: m[2](m[0](x).relu().sort(1)[0][:, 32:96].masked_fill(x > 1, 0.5))),
        lambda: [rows()],
    ),
}


@pytest.mark.parametrize("mode", ["lossless", "4:1"])
@pytest.mark.parametrize("name", GRAPHS)
def test_matches_eager(name: str, mode: str) -> None:
    make, inputs = GRAPHS[name]
    model, arguments = make(), inputs()
    eager, ours = step(model, arguments, "eager"), step(model, arguments, mode)
    assert ours.plans
    for there, here in zip(eager.outputs, ours.outputs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
        assert here.stride() == there.stride()
    for there, here in zip(eager.inputs, ours.inputs, strict=True):  # what the forward did to its arguments
        assert torch.equal(there, here)
    for buffer, value in eager.buffers.items():
        torch.testing.assert_close(ours.buffers[buffer], value)
    assert {n: e for n, e in errors(eager, ours).items() if e > max(ours.bound, ROUNDING)} == {}
    if mode == "lossless":
        assert ours.bound == 0
    assert ours.saved.nbytes == ours.planned_saved_bytes


def test_dropout_recomputed_from_a_saved_rng_state() -> None:
    """``fallback_random`` with checkpoints: torch saves RNG states, and plans count them."""
    model = Lambda(lambda m, x: checkpointed(m, x, p=0.3))
    with torch._inductor.config.patch(fallback_random=True):
        eager = step(model, [rows()], "eager")
        for mode in ("lossless", "4:1"):
            ours = step(model, [rows()], mode)
            torch.testing.assert_close(ours.outputs[0], eager.outputs[0], rtol=1e-5, atol=1e-6)
            assert max(errors(eager, ours).values()) <= max(ours.bound, ROUNDING)
            assert ours.saved.nbytes == ours.planned_saved_bytes
            assert "RNG states" in " ".join(ours.plans[0].notes)


@pytest.mark.parametrize("dynamic", [True, None])
def test_several_batch_sizes(dynamic: bool | None) -> None:
    model = Lambda(lambda m, x: m[2](F.gelu(m[2](x)).t() @ x).relu())
    run = compiled(model, "4:1", dynamic=dynamic)
    for size in (33, 7, 64, 1, 2, 129):
        gradients = []
        for function in (model, run):
            model.zero_grad()
            loss, _ = weighted_sum([function(rows(size))])
            loss.backward()
            gradients.append(
                {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        bound = max(p.gradient_error_bound for p in ciuic_compile.plans())
        for name, there in gradients[0].items():
            assert (gradients[1][name] - there).norm() <= bound * there.norm(), (size, name)
    plans = ciuic_compile.plans()
    assert [p.dynamic for p in plans] == (
        [True, False] if dynamic else [False, True, False]
    )  # size 1 is special
    assert "s" in plans[0].symbolic_saved_bytes if dynamic else plans[0].symbolic_saved_bytes.isdigit()


@pytest.mark.parametrize("mode", ["lossless", "4:1"])
def test_sizes_that_depend_on_data(mode: str) -> None:
    """As many rows as a mask has: planned at a guess, the same one wherever bytes are counted."""

    def chosen(layers: nn.ModuleList, x: Tensor, mask: Tensor) -> Tensor:
        rows_left = layers[2](x)[mask.nonzero().squeeze(1)]
        return layers[2](F.layer_norm(F.gelu(rows_left), (64,))).sum(1, keepdim=True) * rows_left

    model, arguments = Lambda(chosen), [rows(), torch.arange(33) % 3 > 0]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        eager, ours = step(model, arguments, "eager"), step(model, arguments, mode)
    (plan,) = ours.plans
    assert 0 < plan.planned_saved_bytes <= plan.baseline_saved_bytes
    torch.testing.assert_close(ours.outputs[0], eager.outputs[0], rtol=1e-5, atol=1e-6)
    assert max(errors(eager, ours).values()) <= max(ours.bound, ROUNDING)


@pytest.mark.parametrize("mode", ["4:1", "6:1"])
def test_relu_masks_are_exact(mode: str) -> None:
    """The gradient of what goes into a ReLU is zero exactly where eager's is, although its value is lossy."""
    model = Lambda(lambda m, x, probe: m[1]((m[0](x) + probe).relu()))
    inputs = [rows(), torch.zeros(33, 128, requires_grad=True)]
    eager, ours = step(model, inputs, "eager"), step(model, inputs, mode)
    assert any(d.codec and d.codec.startswith("int") for d in ours.plans[0].decisions)
    (there, here) = (s.input_gradients[1] for s in (eager, ours))
    assert there is not None and here is not None
    assert torch.equal(there == 0, here == 0)
    assert 0.2 < (there == 0).double().mean() < 0.8


@pytest.mark.parametrize("mode", ["lossless", "4:1", "6:1"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_activations_reach_the_gradients(value: float, mode: str) -> None:
    """Where eager's gradients are NaN or infinite ours are too, and nowhere else: groups are not poisoned."""

    def forward(layers: nn.ModuleList, x: Tensor, spike: Tensor) -> Tensor:
        return layers[2](layers[2](x).sigmoid() + spike)

    spike = torch.zeros(33, 64)
    spike[5, 7] = value
    eager, ours = (step(Lambda(forward), [rows(), spike], m) for m in ("eager", mode))
    for name, there in eager.gradients.items():
        assert torch.equal(there.isfinite(), ours.gradients[name].isfinite()), name
    assert not eager.gradients["layers.2.weight"].isfinite().all()


def test_outputs_are_never_compressed_or_changed() -> None:
    """An intermediate that is also returned, or views of which are, stays exact."""

    def forward(layers: nn.ModuleList, x: Tensor) -> dict[str, Any]:
        h = F.gelu(layers[0](x))
        return {"out": [layers[2](layers[1](h).tanh())], "hidden": (h, h.t(), h.view(-1, 64)[3:], h.detach())}

    model = Lambda(forward)
    eager, ours = step(model, [rows()], "eager"), step(model, [rows()], "6:1")
    for there, here in zip(eager.outputs, ours.outputs, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-6)
    decisions = ours.plans[0].decisions
    assert any(d.action is Action.COMPRESS for d in decisions)
    returned = [d for d in decisions if d.storage.kept_because and "output" in d.storage.kept_because]
    assert [d.storage.shape for d in returned] == [(33, 128)]
    assert [d.codec for d in returned] == [None]


def test_parameters_are_never_lossy() -> None:
    """Nor what is computed from them alone."""
    model = Lambda(lambda m, x: F.linear(F.linear(x, m[2].weight.tanh()).relu(), m[2].weight.square() + 1))
    ours = step(model, [rows().requires_grad_()], "6:1")
    shapes = [d.storage.shape for d in ours.plans[0].decisions if d.codec]
    assert (64, 64) not in shapes and shapes
    assert not any(d.storage.name.startswith("primals") for d in ours.plans[0].decisions)


@pytest.mark.parametrize("mode", ["lossless", "4:1", "6:1"])
def test_pooling_keeps_its_int8_offsets(mode: str) -> None:
    """Indices are rebuilt from the offsets that Inductor saves, not saved at eight times the size."""
    images = torch.randn(4, 3, 16, 16).requires_grad_()
    ours = step(convnet(), [images], mode)
    dtypes = {d.storage.dtype for d in ours.plans[0].decisions if d.saved_bytes}
    assert "int8" in dtypes and "int64" not in dtypes


#: A small error in what is saved would be a big one here: poles, jumps, slopes that grow with the scale.
SINGULAR: dict[str, Callable[[Tensor], Tensor]] = {
    "log": lambda h: h.abs().log(),
    "log1p": lambda h: (h.square() - 0.999).clamp(min=-0.9999).log1p(),
    "xlogy": lambda h: torch.xlogy(h, h.abs()),
    "reciprocal": lambda h: 1 / (h.square() + 1e-3),
    "sqrt": lambda h: h.abs().sqrt(),
    "rsqrt": lambda h: (h.square() + 1e-4).rsqrt(),
    "smooth sign": lambda h: h / (h.square() + 1e-3).sqrt(),
    "power": lambda h: (h.abs() + 1e-2) ** -0.5,
    "numerator": lambda h: h.sin() * (h.flip(1).abs() + 1e-2) ** -1.5,
    "division": lambda h: h / (h.flip(1) + 1e-2),
    "hypot": lambda h: torch.hypot(h, h.flip(1)),
    "atan2": lambda h: torch.atan2(h, h.flip(1)),
    "tan": lambda h: h.tan(),
    "asin": lambda h: (0.9999 * h.tanh()).asin(),
    "atanh": lambda h: (0.9999 * h.tanh()).atanh(),
    "acosh": lambda h: (1.001 + h.square()).acosh(),
    "erfinv": lambda h: (0.9999 * h.tanh()).erfinv(),
    "logit": lambda h: h.sigmoid().logit(),
    "lgamma": lambda h: (2 * h).exp().lgamma(),
    "digamma": lambda h: (h.abs() + 1e-2).digamma(),
    "inverse": lambda h: torch.linalg.inv(h[:32].reshape(-1, 8, 8)).reshape(32, 64),
    "abs": lambda h: h.abs(),
    "many turns of a sine": lambda h: (8 * h).sin(),
    "sinh": lambda h: (3 * h).sinh(),
    "log-softmax of wide logits": lambda h: F.log_softmax(8 * h, -1),
}

#: Look like those, but are Lipschitz or divide by a statistic: what they read may be compressed.
TAME: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "log-sigmoid": F.logsigmoid,
    "SiLU": F.silu,
    "SiLU by hand": lambda h: h / (1 + (-h).exp()),
    "GELU": F.gelu,
    "GELU by tanh": lambda h: F.gelu(h, approximate="tanh"),
    "mish": F.mish,
    "ELU": F.elu,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "cube": lambda h: h**3,
    "x / norm": lambda h: h / h.norm(dim=-1, keepdim=True),
    "normalize": F.normalize,
    "cosine similarity": lambda h: h * F.cosine_similarity(h, h.flip(1))[:, None],
    "standardized": lambda h: (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True) + 1e-3).sqrt(),
    "layer norm": lambda h: F.layer_norm(h, (64,)),
    "RMS norm": lambda h: F.rms_norm(h, (64,)),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
}


def gradients_of(function: Callable[[Tensor], Tensor], mode: str) -> tuple[dict[str, float], Step]:
    """Errors of the gradients of a function between two layers, and the step."""
    model = Lambda(lambda m, x: m[2](function(2 * m[2](x))))
    eager, ours = step(model, [rows()], "eager"), step(model, [rows()], mode)
    return errors(eager, ours), ours


@pytest.mark.parametrize("mode", ["4:1", "6:1"])
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_derivatives(name: str, mode: str) -> None:
    found, ours = gradients_of(SINGULAR[name], mode)
    assert max(found.values()) <= max(ours.bound, ROUNDING)
    kept = {d.storage.kind for d in ours.plans[0].decisions if d.saved_bytes and not d.codec}
    assert kept & {TensorClass.SINGULAR, TensorClass.SOFTMAX_INPUT}


@pytest.mark.parametrize("mode", ["4:1", "6:1"])
@pytest.mark.parametrize("name", TAME)
def test_tame_derivatives_read_compressed_values(name: str, mode: str) -> None:
    found, ours = gradients_of(TAME[name], mode)
    assert max(found.values()) <= ours.bound
    assert TensorClass.SINGULAR not in {d.storage.kind for d in ours.plans[0].decisions}
    assert ours.plans[0].ratio > 4


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.GroupNorm(32, 64), (33, 64)), (nn.BatchNorm1d(64), (2, 64)), (nn.GroupNorm(16, 64), (33, 64))],
    ids=["groups of 2", "batch of 2", "groups of 4"],
)
@pytest.mark.parametrize("mode", ["2:1", "6:1"])
def test_norms_over_few_elements(norm: nn.Module, shape: tuple[int, ...], mode: str) -> None:
    """Over two elements a norm gives signs, and its backward is what is left of dy: nothing lossy goes in."""
    model = Lambda(lambda m, x: m[2](m[3](m[2](x)).tanh()), [*Lambda(lambda m, x: x).layers, norm])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    inductor, ours = step(model, [x], "inductor"), step(model, [x], mode)
    assert max(errors(inductor, ours).values()) <= max(ours.bound, ROUNDING)


def test_complex_values_are_kept_and_carry_the_errors_of_what_they_are_rebuilt_from() -> None:
    def forward(m: nn.ModuleList, x: Tensor) -> Tensor:
        h = F.gelu(m[0](x))
        product = torch.complex(h, h) * torch.complex(
            h, -2 * h
        )  # by a complex number: torch 2.11's Inductor fails
        return torch.fft.rfft(h).abs().square().mean() + product.abs().square().mean()

    model = Lambda(forward)
    inductor, ours = step(model, [rows()], "inductor"), step(model, [rows()], "6:1")
    found = max(errors(inductor, ours).values())
    assert found <= max(ours.bound, ROUNDING)
    assert not any(d.codec for d in ours.plans[0].decisions if "complex" in d.storage.dtype)
    assert all("integers" not in d.reason for d in ours.plans[0].decisions if "complex" in d.storage.dtype)


def test_lossless_never_saves_more_than_inductor() -> None:
    model = Lambda(lambda m, x: m[2](m[2](x).cumprod(-1)))
    (plan,) = step(model, [rows()], "lossless").plans
    assert plan.planned_saved_bytes <= plan.baseline_saved_bytes
