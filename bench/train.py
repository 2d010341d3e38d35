"""Train the same byte-level language model from the same seed on the same batches, as any configuration."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import common, measure, text
from bench.language import GPT, TransformerConfig
from bench.models import WithLoss


@dataclass(frozen=True)
class Setting:
    """A model, how long to train it and on what."""

    model: TransformerConfig
    steps: int
    rate: float = 1e-3
    warmup: int = 20
    precision: str = "fp32"
    seed: int = 0
    validate_every: int = 0  # steps; 0: at the end only
    validation_batches: int = 16


# a CPU with 2 cores: about a minute a run; a GPU: 25 million parameters and up
CPU = Setting(TransformerConfig(4, 192, 6, 6, 768, text.VOCAB, 128, 8), steps=250, rate=2e-3)
GPU = Setting(
    TransformerConfig(8, 512, 8, 8, 2048, text.VOCAB, 1024, 32), steps=400, precision="autocast", warmup=100
)


@dataclass(frozen=True)
class Run:
    """What one training did. ``curve``: (step, training loss); ``validation``: (step, nats a byte)."""

    config: str
    parameters: int
    curve: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    saved: int
    peak: int
    first_step_s: float
    step_ms: float

    def as_dict(self) -> dict[str, Any]:
        """For a result file."""
        return asdict(self)


def train(setting: Setting, config: str, corpus: text.Corpus, device: torch.device) -> Run:
    """Train, with a progress bar on stderr; saved bytes and peak are measured at the second step."""
    torch._dynamo.reset()
    torch.manual_seed(setting.seed)
    shape = setting.model
    model = WithLoss(GPT(shape)).to(device)
    compiled = common.compile_as(model, config)
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.rate, betas=(0.9, 0.95), weight_decay=0.1, **fused
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, setting))

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with common.autocast(setting.precision, device):
            return compiled(inputs, targets)

    held_out = corpus.validation(setting.validation_batches, shape.batch, shape.seq, device)

    def validate() -> float:
        """With the uncompiled model, so that it measures the weights and nothing else."""
        with torch.no_grad(), common.autocast(setting.precision, device):
            return float(torch.stack([model(*batch) for batch in held_out]).mean())

    losses: list[Tensor] = []
    validation: list[tuple[int, float]] = []
    saved = peak_bytes = 0
    start = warm = time.perf_counter()
    first = 0.0
    report = progress(config, setting.steps)
    for step in range(setting.steps):
        batch = corpus.batch(setting.seed, step, shape.batch, shape.seq, device)
        if step == 1:  # compiled, and the optimizer has its state
            saved, peak_bytes = _measure(loss_of, batch, model, device)
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step <= 1:
            first = first or time.perf_counter() - start
            warm = time.perf_counter()
        if setting.validate_every and (step + 1) % setting.validate_every == 0 and step + 1 < setting.steps:
            paused = time.perf_counter()
            validation.append((step + 1, validate()))
            warm += time.perf_counter() - paused
        report(step + 1, losses[-1] if step % 10 == 9 or step + 1 == setting.steps else None)
    curve = [(i, float(x)) for i, x in enumerate(losses)]  # waits for the device
    step_ms = 1e3 * (time.perf_counter() - warm) / max(setting.steps - 2, 1)
    validation.append((setting.steps, validate()))
    parameters = sum(p.numel() for p in model.parameters())
    return Run(config, parameters, curve, validation, saved, peak_bytes, first, step_ms)


def _measure(
    loss_of: Callable[..., Tensor], batch: tuple[Tensor, Tensor], model: WithLoss, device: torch.device
) -> tuple[int, int]:
    with measure.peak(device) as peak:
        loss = loss_of(*batch)
        loss.backward()
        del loss
    model.zero_grad(set_to_none=True)
    saved = measure.saved(loss_of(*batch), measure.model_tensors(model, *batch))
    return saved.nbytes, peak.nbytes


def _rate(step: int, setting: Setting) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < setting.warmup:
        return (step + 1) / setting.warmup
    done = (step - setting.warmup) / max(setting.steps - setting.warmup, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(done, 1.0)))


def progress(label: str, total: int) -> Callable[[int, Tensor | None], None]:
    """Return ``report(done, loss or None)``: a bar on a terminal's stderr, a line each tenth elsewhere."""
    terminal = sys.stderr.isatty()
    start = time.perf_counter()
    last = math.nan

    def report(done: int, loss: Tensor | None) -> None:
        nonlocal last
        if loss is not None:
            last = float(loss)
        if not terminal and (done * 10 // total == (done - 1) * 10 // total):
            return
        filled = 30 * done // total
        bar = "#" * filled + "." * (30 - filled)
        line = f"{label:>9} [{bar}] {done}/{total}  loss {last:.3f}  {time.perf_counter() - start:.0f} s"
        end = "\n" if done == total or not terminal else ""
        print(("\r" if terminal else "") + line, end=end, file=sys.stderr, flush=True)

    return report
