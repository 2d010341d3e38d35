"""Extraction against torch's own: the same graphs, node by node, for whatever is saved."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bench.models import MODELS, WithLoss
from ciuic_compile.compat_extract import Extractor, extract_as_torch, is_simple
from ciuic_compile.planner import _options
from ciuic_compile.planner.formulate import formulate, storable
from tests.stages import Stage, stage


def described(gm: fx.GraphModule) -> list[tuple[object, ...]]:
    """Everything that later stages read of a graph."""
    return [
        (
            n.op,
            n.name,
            str(n.target),
            str(n.args),
            str(n.kwargs),
            id(n.meta.get("val")),
        )
        for n in gm.graph.nodes
    ]


def check(found: Stage, rng: random.Random, rounds: int = 5) -> None:
    """Random decisions: what is saved, computed again or made of other values."""
    captured, model = found.model.captured, found.model
    joint = captured.graph.owning_module
    assert joint is not None
    options = {n: _options(model, n, 0.0, model.device) for n in storable(model)}
    formulation = formulate(model, options, found.selection.saved)
    extract = Extractor(joint, captured.info, captured.num_fwd_outputs)
    choices = [captured.baseline_saved, found.selection.saved]
    for share in [rng.random() for _ in range(rounds)]:
        decision = tuple(
            -1 if c.rebuild is not None and rng.random() < share else 0
            for c in formulation.problem.candidates
        )
        choices.append(formulation.saved(decision))
    assert len({tuple(c) for c in choices}) > rounds / 2
    for saved in choices:
        ours = extract(saved)
        theirs = extract_as_torch(joint, saved, captured.info, captured.num_fwd_outputs)
        for mine, its in zip(ours, theirs, strict=True):
            assert described(mine) == described(its)


@pytest.mark.parametrize("name", ["gpt", "unet"])
def test_the_same_graphs_as_torchs_own(name: str) -> None:
    torch.manual_seed(0)
    built, batches, loss = MODELS[name]("tiny")
    found = stage(
        WithLoss(built, loss), *batches(0, torch.device("cpu")), backward=lambda loss: loss.backward()
    )
    assert is_simple(found.model.captured.graph)
    check(found, random.Random(name))


class Dropped(nn.Module):
    """Random numbers, a batch norm that overwrites its statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(F.relu(self.norm(self.conv(x))), 0.5).mean((2, 3)))


def test_effects_and_symbols_are_left_to_torch() -> None:
    x = torch.randn(4, 3, 8, 8)
    assert not is_simple(stage(Dropped(), x).model.captured.graph)
    linear = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    assert not is_simple(stage(linear, torch.randn(4, 8), dynamic=True).model.captured.graph)
