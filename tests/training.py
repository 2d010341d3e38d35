"""Tiny models and one training step of them, compiled or eager, with everything a test may ask about it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

import ciuic_compile
from bench.language import Llama, TransformerConfig
from bench.measure import Saved, model_tensors, saved
from ciuic_compile import Plan, backend

MODES = ("off", "lossless", "2:1", "4:1", "6:1")
SMALL = 256  # min_bytes in these tests: nearly every tensor of a tiny model may be compressed


# ---------------------------------------------------------------- caches and lowering


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of compiled C++ kernels, keyed by their source text, for all tests that ask for it."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "kernels"  # xdist's workers share it


@contextlib.contextmanager
def only_kernels_cached(folder: Path) -> Iterator[Path]:
    """Every compile plans and lowers anew; only g++ is not run twice on the same source."""
    with (
        mock.patch.dict("os.environ", {"TORCHINDUCTOR_CACHE_DIR": str(folder)}),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        torch._dynamo.reset()
        yield folder
        torch._dynamo.reset()


@contextlib.contextmanager
def interpreted(before_each_run: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Run the partitioned graphs with eager kernels in place of Inductor's code: everything but codegen.

    Not for models with random ops: ``inductor_random``'s eager kernel does not read its seed.
    """

    def run_eagerly(gm: torch.fx.GraphModule, example_inputs: object, **kwargs: object) -> object:
        def run(*args: Any) -> Any:
            before_each_run()
            return gm.forward(*args)

        return make_boxed_func(run)

    lowered = functools.partial(compile_fx, inner_compile=run_eagerly)
    with mock.patch.object(backend, "compile_fx", lowered):
        yield


# ---------------------------------------------------------------- one step


@dataclass
class Step:
    """One forward and backward: copies of what came out, and the plans made on the way."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    input_gradients: list[Tensor | None]
    buffers: dict[str, Tensor]
    saved: Saved
    plans: tuple[Plan, ...]
    inputs: list[Any] = field(default_factory=list)

    @property
    def bound(self) -> float:
        """The loosest bound that a plan of this step states for one parameter."""
        return max(p.gradient_error_bound for p in self.plans)

    @property
    def planned_saved_bytes(self) -> int:
        """Sum over the plans."""
        return sum(p.planned_saved_bytes for p in self.plans)


def compiled(
    model: Callable[..., Any], mode: str, *, options: dict[str, Any] | None = None, **kwargs: Any
) -> Any:
    """``model`` itself for "eager", compiled by Inductor for "inductor", else by ciuic in that mode."""
    if mode == "eager":
        return model
    if mode == "inductor":
        return torch.compile(model, backend="inductor", **kwargs)
    ours = {"mode": mode, "min_bytes": SMALL, "report": "off", **(options or {})}
    return torch.compile(model, backend="ciuic", options=ours, **kwargs)


def step(
    model: nn.Module,
    inputs: Sequence[Any],
    mode: str,
    *,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Step:
    """Train a copy of ``model`` for one step on copies of ``inputs``; ``kwargs`` go to ``torch.compile``."""
    torch._dynamo.reset()
    model = copy.deepcopy(model)
    inputs = [
        i.detach().clone().requires_grad_(i.requires_grad) if isinstance(i, Tensor) else i for i in inputs
    ]
    run = compiled(model, mode, options=options, **kwargs)
    torch.manual_seed(seed)
    outputs = [o for o in torch.utils._pytree.tree_leaves(run(*inputs)) if isinstance(o, Tensor)]
    loss, weights = weighted_sum(outputs)
    held = saved(loss, [*model_tensors(model, *(i for i in inputs if isinstance(i, Tensor))), *weights])
    copies = [o.detach().clone() for o in outputs]
    loss.backward()
    assert all(torch.equal(o, c) or o.isnan().any() for o, c in zip(outputs, copies, strict=True)), (
        "the backward overwrote an output"
    )
    return Step(
        copies,
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        [i.grad for i in inputs if isinstance(i, Tensor)],
        dict(model.named_buffers()),
        held,
        ciuic_compile.plans(),
        inputs,
    )


def weighted_sum(outputs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A loss whose gradients differ everywhere, the same for equal shapes; and what it holds itself."""
    generator = torch.Generator().manual_seed(7)
    loss, weights = torch.zeros(()), []
    for output in outputs:
        if output.requires_grad:
            weights.append(torch.randn(output.shape, generator=generator).to(output.dtype))
            loss = loss + (output * weights[-1]).sum().real.double()
    return loss, weights


def errors(reference: Step, got: Step) -> dict[str, float]:
    """Relative error per gradient, those of the inputs included; nearly zero gradients left out.

    A gradient that is zero in exact arithmetic (a bias before BatchNorm) has no relative error.
    """
    pairs = {n: (g, got.gradients[n]) for n, g in reference.gradients.items()}
    for i, (there, here) in enumerate(zip(reference.input_gradients, got.input_gradients, strict=True)):
        assert (there is None) == (here is None)
        if there is not None and here is not None:
            pairs[f"input {i}"] = (there, here)
    assert set(reference.gradients) == set(got.gradients)
    norms = {n: wide(a).norm().item() for n, (a, _) in pairs.items()}
    rms = (sum(v * v for v in norms.values()) / max(1, len(norms))) ** 0.5
    return {
        n: (wide(a) - wide(b)).norm().item() / max(norms[n], 1e-300)
        for n, (a, b) in pairs.items()
        if norms[n] > 1e-4 * rms
    }


def wide(x: Tensor) -> Tensor:
    """``x`` in the widest dtype of its kind."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


# ---------------------------------------------------------------- models


class Lambda(nn.Module):
    """``forward(*inputs)`` is ``function(layers, *inputs)``; layers are 64 to 128, 128 to 64 and 64 to 64."""

    def __init__(self, function: Callable[..., Any], layers: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers or [nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64)])

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.layers, *inputs)


class AttentionBlock(nn.Module):
    """LayerNorm, fused q/k/v, scaled dot-product attention, GELU."""

    def __init__(self, d: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        out: Tensor = x + self.down(F.gelu(self.up(self.ln2(x))))
        return out


def mlp(dropout: float = 0.0) -> nn.Sequential:
    """Linear, ReLU, maybe dropout, linear, LayerNorm, linear; 64 features in."""
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), *drop, nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 10)
    )


def convnet() -> nn.Sequential:
    """Two convolutions with BatchNorm and ReLU, a max pool between them."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 8 * 8, 10)),
    )


def rows(n: int = 33) -> Tensor:
    """A batch for :func:`mlp` and :class:`Lambda`; 33 rows do not divide into groups evenly."""
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(n))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "mlp with dropout": (lambda: mlp(0.2), lambda: [rows()]),
    "attention": (
        AttentionBlock,
        lambda: [torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()],
    ),
    "llama": (
        lambda: Llama(TransformerConfig(1, 64, 4, 2, 128, 97, 32, 2)),
        lambda: [torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(1))],
    ),
    "convnet": (convnet, lambda: [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))]),
    "embedding": (
        lambda: nn.Sequential(
            nn.Embedding(50, 64, padding_idx=0), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)
        ),
        lambda: [torch.randint(0, 50, (8, 9), generator=torch.Generator().manual_seed(1))],
    ),
}


@functools.cache
def zoo_step(name: str, mode: str) -> Step:
    """One step of a model of the zoo, from the same weights in every mode."""
    make, inputs = ZOO[name]
    torch.manual_seed(0)
    return step(make(), inputs(), mode)
