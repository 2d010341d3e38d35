"""Logits and loss in chunks: gradients and losses of the unchunked step, less memory, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import peak, saved
from tests.training import Step, compiled, errors, interpreted, kernel_cache, only_kernels_cached, step

__all__ = ["kernel_cache"]

CLASSES, WIDTH = 97, 16
ROUNDING = 5e-6
Loss = Callable[[Tensor, Tensor], Any]


class Tiny(nn.Module):
    """Embedding, a residual layer, LayerNorm, head, and a loss of the logits."""

    def __init__(self, loss: Loss, bias: bool = True, tied: bool = False, classes: int = CLASSES) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Embedding(classes, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes, bias=bias)
        if tied:
            self.head.weight = self.tokens.weight
        self.loss = loss

    def forward(self, ids: Tensor, targets: Tensor) -> Any:
        x = self.tokens(ids)
        return self.loss(self.head(self.norm(x + torch.tanh(self.layer(x)))), targets)


def flat(**options: Any) -> Loss:
    """The usual way: float32 logits, flattened."""
    return lambda logits, targets: F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]), targets.reshape(-1), **options
    )


def shifted(logits: Tensor, targets: Tensor) -> Tensor:
    """As Hugging Face did: the last logits and the first targets are left out."""
    logits = logits.float()[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets[..., 1:].contiguous().view(-1))


def z_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """A second term, in the logsumexp."""
    wide = logits.float().flatten(0, 1)
    return F.cross_entropy(wide, targets.flatten()) + 1e-2 * wide.logsumexp(-1).square().mean()


WEIGHT = torch.rand(CLASSES, generator=torch.Generator().manual_seed(3))
LOSSES: dict[str, Loss] = {
    "mean": flat(),
    "sum": flat(reduction="sum"),
    "none": flat(reduction="none"),
    "ignore_index": lambda a, b: flat(ignore_index=5)(a, b.clamp(min=5)),
    "label_smoothing": flat(label_smoothing=0.1),
    "class weights": lambda a, b: flat(weight=WEIGHT.to(a.device))(a, b),
    "weights, smoothing, sum": lambda a, b: flat(weight=WEIGHT, label_smoothing=0.2, reduction="sum")(a, b),
    "shifted": shifted,
    "transposed": lambda a, b: F.cross_entropy(a.transpose(1, 2), b),
    "no cast": lambda a, b: F.cross_entropy(a.flatten(0, 1), b.flatten()),
    "z-loss": z_loss,
    "two views": lambda a, b: F.nll_loss(F.log_softmax(a.float(), -1).flatten(0, 1), b.flatten()),
}
#: Losses whose code is generated: that of the others has nothing that theirs has not.
GENERATED = ("mean", "none", "weights, smoothing, sum", "shifted", "z-loss")
ON: dict[str, Any] = {"chunk_loss": True, "loss_chunk_bytes": 4096}


@pytest.fixture(autouse=True)
def inductor_cache(kernel_cache: Path) -> Iterator[Path]:
    with only_kernels_cached(kernel_cache) as folder:
        yield folder


def batch(count: int = 16) -> list[Tensor]:
    """Ids and targets, some of which are ignored."""
    source = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(0, CLASSES, (2, count), generator=source) for _ in range(2))
    targets[0, 2:5] = -100
    return [ids, targets]


def both(
    model: nn.Module, inputs: list[Tensor] | None = None, mode: str = "lossless", generate: bool = True
) -> tuple[Step, Step]:
    """A step by Inductor, and one by ciuic in chunks; without ``generate``, both in eager kernels."""
    inputs = inputs or batch()
    if not generate:
        with interpreted():
            return step(model, inputs, "eager"), step(model, inputs, mode, options=ON)
    return step(model, inputs, "inductor"), step(model, inputs, mode, options=ON)


def was_chunked(found: Step) -> bool:
    return any(" chunks of tokens" in note for note in found.plans[0].notes)


def same_loss(theirs: Step, ours: Step) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
        for a, b in zip(theirs.outputs, ours.outputs, strict=True)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_the_whole(name: str) -> None:
    torch.manual_seed(0)
    theirs, ours = both(Tiny(LOSSES[name]), generate=name in GENERATED)
    assert was_chunked(ours), ours.plans[0].notes
    assert same_loss(theirs, ours)
    assert max(errors(theirs, ours).values()) < ROUNDING
    assert ours.bound == 0


@pytest.mark.parametrize("tied", [False, True])
def test_measured_saved_bytes_are_the_planned_ones_and_the_baseline_is_inductors(tied: bool) -> None:
    """The logits are no longer saved; the baseline is what Inductor saves of the user's graph."""
    torch.manual_seed(0)
    theirs, ours = both(Tiny(flat(), bias=not tied, tied=tied))
    (plan,) = ours.plans
    assert was_chunked(ours)
    assert theirs.saved.nbytes == plan.baseline_saved_bytes == sum(d.baseline_bytes for d in plan.decisions)
    assert ours.saved.nbytes == plan.planned_saved_bytes
    assert ours.saved.nbytes <= theirs.saved.nbytes - 32 * CLASSES * 4
    assert max(errors(theirs, ours).values()) < ROUNDING
    assert any("chunk by chunk" in d.reason and d.baseline_bytes == 32 * CLASSES * 4 for d in plan.decisions)


@pytest.mark.parametrize("mode", ["2:1", "4:1", "6:1"])
def test_lossy_modes_keep_what_the_logits_are_made_of_exact(mode: str) -> None:
    torch.manual_seed(0)
    theirs, ours = both(Tiny(flat()), mode=mode)
    assert was_chunked(ours) and same_loss(theirs, ours)
    found = errors(theirs, ours)
    assert max(found.values()) < max(ours.bound, ROUNDING)
    assert max(e for n, e in found.items() if n.startswith("head")) < ROUNDING
    assert ours.saved.nbytes == ours.planned_saved_bytes


@pytest.mark.parametrize("loss", ["mean", "shifted", "label_smoothing"])
@pytest.mark.parametrize("how", ["bf16", "autocast"])
def test_half_precision_is_as_close_to_the_exact_gradients(how: str, loss: str) -> None:
    torch.manual_seed(0)
    model = Tiny(LOSSES[loss])
    if how == "bf16":
        model = model.bfloat16()
    exact = step(_like(model, LOSSES[loss]), batch(), "eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        theirs, ours = both(model)
    assert was_chunked(ours)
    there, here = errors(exact, theirs), errors(exact, ours)
    assert all(here[n] <= 1.5 * there[n] + 2e-3 for n in there), (there, here)


def _like(model: Tiny, loss: Loss) -> Tiny:
    """``model`` in float64."""
    twin = Tiny(loss)
    twin.load_state_dict(model.state_dict())
    return twin.double()


def test_all_targets_ignored_is_nan_as_in_torch() -> None:
    ids, targets = batch()
    theirs, ours = both(Tiny(flat()), [ids, torch.full_like(targets, -100)])
    assert was_chunked(ours)
    assert theirs.outputs[0].isnan() and ours.outputs[0].isnan()
    for name, gradient in theirs.gradients.items():
        assert torch.equal(gradient.isnan(), ours.gradients[name].isnan())


def test_gradients_accumulate() -> None:
    torch.manual_seed(0)
    results = []
    for mode in ("inductor", "lossless"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Tiny(flat())
        run = compiled(model, mode, options=ON)
        for scale in (1.0, 0.5):
            (scale * run(*batch())).backward()
        results.append([p.grad for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        assert a is not None and b is not None
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rows_that_do_not_divide() -> None:
    torch.manual_seed(0)
    theirs, ours = both(Tiny(shifted), batch(12))  # 22 rows
    assert was_chunked(ours) and same_loss(theirs, ours)
    assert max(errors(theirs, ours).values()) < ROUNDING


def soft(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))


PROBABILITIES = torch.rand(2, 16, CLASSES, generator=torch.Generator().manual_seed(2)).softmax(-1)
DECLINED: dict[str, tuple[Loss, list[Tensor], str]] = {
    "returned": (lambda a, b: (flat()(a, b), a), batch(), "returned"),
    "returned in float32": (lambda a, b: (flat()(a, b), a.float()), batch(), "returned"),
    "softmax over the tokens": (
        lambda a, b: F.cross_entropy(a, b[:, :1].expand(2, CLASSES).clamp(0, 15)), batch(), "not chunked",
    ),
    "probabilities": (soft, [batch()[0], PROBABILITIES], "class probabilities"),
    "mean of all": (lambda a, b: a.float().square().mean(), batch(), "not understood"),
    "sliced twice": (
        lambda a, b: flat()(a[:, :-1].contiguous(), b[:, 1:]) + flat()(a[:, 1:].contiguous(), b[:, 1:]),
        batch(),
        "sliced twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_not_understood_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    loss, inputs, why = DECLINED[name]
    theirs, ours = both(Tiny(loss), inputs, generate=False)
    assert not was_chunked(ours)
    assert why in " ".join(ours.plans[0].notes)
    assert same_loss(theirs, ours)
    assert max(errors(theirs, ours).values()) < ROUNDING


def test_dynamic_shapes_are_left_alone() -> None:
    torch.manual_seed(0)
    with interpreted():
        ours = step(Tiny(flat()), batch(), "lossless", options=ON, dynamic=True)
    assert not was_chunked(ours)
    assert "dynamic" in " ".join(ours.plans[0].notes)


def test_off_and_small_losses_stay_whole_without_a_word() -> None:
    for options in ({}, {"chunk_loss": False}, {"loss_chunk_bytes": "64MiB"}):
        ours = step(Tiny(flat()), batch(), "lossless", options=options)
        assert not ours.plans[0].notes


def test_automatic_needs_a_gain() -> None:
    """Accumulating the weight's gradient takes more than the logits of a few tokens."""
    with interpreted():
        ours = step(Tiny(flat()), batch(4), "lossless", options={"loss_chunk_bytes": 1})
    assert not was_chunked(ours)
    assert "not chunked, though it could be: the simulated peak" in " ".join(ours.plans[0].notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_peak_falls(dtype: torch.dtype) -> None:
    """In the generated code, chunks run one after the other: the peak loses most of the logits."""
    classes, tokens = 4096, 4096
    source = torch.Generator().manual_seed(1)
    inputs = [torch.randint(0, classes, (4, tokens // 4), generator=source) for _ in range(2)]
    peaks = {}
    for mode in ("inductor", "lossless"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Tiny(flat(), bias=False, classes=classes).to(dtype)
        run = compiled(model, mode, options={"chunk_loss": "auto", "loss_chunk_bytes": "8MiB"})
        run(*inputs).backward()
        model.zero_grad(set_to_none=True)
        with peak(torch.device("cpu")) as found:
            loss = run(*inputs)
            held = saved(loss, [*model.parameters(), *inputs]).nbytes
            loss.backward()
        peaks[mode] = found.nbytes
    logits = classes * tokens * dtype.itemsize
    assert peaks["inductor"] >= logits
    assert held < logits / 16
    assert peaks["lossless"] < logits / 2
