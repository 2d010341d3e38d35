"""Where the loss is chunked, and how finely: on the two plans, without code generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from ciuic_compile import chunking
from ciuic_compile.analyze import MemoryModel
from ciuic_compile.chunking import ACCUMULATING, LEAST_GAIN, choose_chunks, rows_worth_a_chunk, why_whole
from ciuic_compile.config import parse_options
from ciuic_compile.devices import DeviceProfile, named
from ciuic_compile.errors import InfeasibleBudgetError
from ciuic_compile.feed_forward import FeedForwardFinder, is_feed_forward
from ciuic_compile.partitioner import Draft, make_draft, plan_and_rewrite
from ciuic_compile.planner import cost_us
from ciuic_compile.rows import RowFinder
from ciuic_compile.simulate import Peaks
from tests.stages import Stage, memory_of_the_device, stage

CLASSES, WIDTH, TOKENS = 512, 8, 64
AUTO: dict[str, Any] = {"chunk_loss": "auto", "loss_chunk_bytes": 16384}


class Body(nn.Module):
    """Residual layers whose activations are a multiple of the logits, then head and loss."""

    def __init__(self, layers: int, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.norm = nn.Embedding(CLASSES, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, CLASSES, bias=False).requires_grad_(not frozen)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(ids)
        for layer in self.layers:
            x = x + layer(x)
        return F.cross_entropy(self.head(self.norm(x)), targets)


def staged(layers: int, frozen: bool = False, tokens: int = TOKENS, **options: Any) -> Stage:
    """What the partitioner decides for such a body."""
    source = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(0, CLASSES, (tokens,), generator=source) for _ in range(2))
    return stage(Body(layers, frozen), ids, targets, **{"mode": "lossless", **options})


def chunked(found: Stage) -> bool:
    assert (found.model.original is not None) == any(" chunks of tokens" in n for n in found.selection.notes)
    return found.model.original is not None


def test_the_peaks_of_the_final_plans_decide() -> None:
    """At 2:1 both plans save half, and chunks only spare codecs; at 6:1 whole logits put it out of reach."""
    assert chunked(staged(8, **AUTO))
    assert chunked(staged(8, **AUTO, mode="6:1"))
    both = staged(56, **AUTO, mode="2:1")
    assert not chunked(both)
    (note,) = both.selection.notes
    assert "not chunked, though it could be: the simulated peak would be" in note
    assert chunked(staged(56, **{**AUTO, "chunk_loss": True}, mode="2:1"))  # True does not weigh


def test_the_plan_states_the_time_of_the_logits_made_again() -> None:
    times = {}
    for chunk in (True, False):
        found = staged(1, **{**AUTO, "chunk_loss": chunk})
        plan = plan_and_rewrite("graph", found.model, found.selection, found.baseline, found.graphs())
        times[chunk] = plan.time_us
    again = 2 * TOKENS * CLASSES * WIDTH / named("cpu").flop_per_us(4)
    assert times[True] - times[False] == pytest.approx(again)


@pytest.fixture
def no_gain_is_enough() -> Iterator[None]:
    with mock.patch.object(chunking, "LEAST_GAIN", 2.0):
        yield


def draft(found: Stage) -> Draft:
    return make_draft(found.model, found.selection, found.graphs())


@pytest.mark.usefixtures("no_gain_is_enough")
def test_a_budget_that_only_chunks_fit_takes_them() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        staged(1, chunk_loss=False, budget=1000)
    assert isinstance(caught.value.inner_exception, InfeasibleBudgetError)
    smallest = caught.value.inner_exception.smallest_bytes
    found = staged(1, **AUTO, budget=int(0.95 * smallest))
    assert chunked(found)
    assert draft(found).planned.peak <= 0.95 * smallest


@pytest.mark.usefixtures("no_gain_is_enough")
def test_a_budget_that_would_cost_the_gradients_more_takes_chunks() -> None:
    assert not chunked(staged(8, **AUTO, mode="2:1", budget=230_000))
    squeezed = draft(staged(8, chunk_loss=False, mode="2:1", budget=200_000))
    assert squeezed.codecs.tightened
    found = staged(8, **AUTO, mode="2:1", budget=200_000)
    assert chunked(found)
    assert draft(found).codecs.variance < squeezed.codecs.variance


def test_a_budget_that_is_met_without_chunks_leaves_the_loss_whole() -> None:
    """Without a budget they are worth a lower peak; with one, that peak is low enough, and time counts."""
    unlimited = staged(8, **AUTO)
    assert chunked(unlimited)
    found = staged(8, **AUTO, budget=int(0.9 * unlimited.baseline.peak))
    assert not chunked(found)
    assert "the budget is met for less time without" in " ".join(found.selection.notes)


@pytest.mark.parametrize(("share", "chunks"), [(0.7, True), (0.9, False)])
def test_under_a_budget_the_plan_is_the_one_that_costs_less(share: float, chunks: bool) -> None:
    """Logits made again cost matmuls, and spare what the whole loss has to rebuild to fit."""
    budget = int(share * staged(8, chunk_loss=False).baseline.peak)
    costs = {}
    for chunk_loss in (True, False):
        found = staged(8, **{**AUTO, "chunk_loss": chunk_loss}, budget=budget)
        assert draft(found).planned.peak <= budget
        costs[chunk_loss] = cost_us(found.model, draft(found).codecs)
    assert (costs[True] < costs[False]) == chunks
    assert chunked(staged(8, **AUTO, budget=budget)) == chunks


def test_a_budget_too_small_for_chunks_leaves_the_loss_whole() -> None:
    """Few tokens: accumulating the weight's gradient takes more than their logits."""
    few = {**AUTO, "tokens": 8, "loss_chunk_bytes": 4096}
    whole = draft(staged(1, tokens=8, chunk_loss=False)).planned.peak
    found = staged(1, **few, budget=whole)
    assert not chunked(found)
    assert "the budget leaves no room" in " ".join(found.selection.notes)
    assert not chunked(staged(1, **few))


@pytest.mark.parametrize(
    ("before", "after", "whole"), [(1000, 901, True), (1000, 900, False), (1000, 1100, True)]
)
def test_the_peak_must_fall_by_a_tenth(before: int, after: int, whole: bool) -> None:
    assert LEAST_GAIN == 0.1
    assert bool(why_whole(Peaks(0, before, 10), Peaks(0, 10, after))) == whole


def share_of_matmuls(rows: float, device: DeviceProfile, itemsize: int, matmuls: int) -> float:
    """Time to accumulate a [50304, 1024] gradient over the time of the chunk's matmuls."""
    elements = 50304 * 1024
    product, accumulator = 2 * itemsize * elements, 2 * 4 * elements  # written and read; read and written
    flop = matmuls * 2 * rows * elements
    return device.microseconds(product + accumulator) / (flop / device.flop_per_us(itemsize))


@pytest.mark.parametrize("device", ["h200", "h100", "a100", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulating_takes_a_tenth_of_a_chunk(device: str, dtype: torch.dtype) -> None:
    found = staged(1, chunk_loss=False)
    logits = found.nodes(torch.ops.aten.mm)[-1]
    region = RowFinder(found.captured, logits).find()
    logits.meta["val"] = logits.meta["val"].to(dtype)
    rows = rows_worth_a_chunk(region, named(device))
    assert share_of_matmuls(rows, named(device), dtype.itemsize, 4) == pytest.approx(ACCUMULATING)


def test_a_frozen_head_accumulates_nothing() -> None:
    found = staged(1, frozen=True, chunk_loss=False)
    region = RowFinder(found.captured, found.nodes(torch.ops.aten.mm)[-1]).find()
    assert rows_worth_a_chunk(region, named("h200")) == 1


def count(model: MemoryModel, rows: int, **options: Any) -> int:
    """Chunks on a device on which so many rows are worth a chunk."""
    config = parse_options({"mode": "lossless", "chunk_loss": "auto", **options})
    with (
        mock.patch("ciuic_compile.analyze.profile_for", return_value=named("cpu")),
        mock.patch.object(chunking, "rows_worth_a_chunk", return_value=rows),
        mock.patch.object(chunking, "CHUNK_BYTES", 512),
    ):
        chunk = choose_chunks(replace(model, config=config)).chunk
    return 1 if chunk is None else chunk.chunks


def test_chunks_are_as_long_as_pays_unless_the_user_says_how_large() -> None:
    model = staged(1, chunk_loss=False).model
    size = TOKENS * CLASSES * 4
    assert [count(model, rows) for rows in (1, 4, 5, 16, 32, 64)] == [32, 16, 8, 4, 2, 2]
    assert count(model, 16, loss_chunk_bytes=size // 8) == 8
    assert count(model, 16, loss_chunk_bytes=size) == 1  # nothing to gain


# ---------------------------------------------------------------- feed-forwards


def feed_forwards_chunked(found: Stage) -> bool:
    return any("feed-forward" in n and " chunks of tokens" in n for n in found.selection.notes)


@pytest.fixture
def no_size_is_small() -> Iterator[None]:
    with mock.patch.object(chunking, "CHUNK_BYTES", 512):
        yield


@pytest.mark.usefixtures("no_size_is_small")
def test_feed_forwards_are_chunked_where_a_ratio_or_a_budget_is_missed_without() -> None:
    options: dict[str, Any] = {"chunk_loss": False, "chunk_ffn": "auto", "tokens": 1024}
    for mode in ("lossless", "1.1:1"):
        found = staged(4, **options, mode=mode)
        assert not feed_forwards_chunked(found)
        assert "feed-forwards are not chunked, though they could be: ratio" in " ".join(found.selection.notes)
    assert feed_forwards_chunked(staged(4, **options, mode="40:1"))
    whole = draft(staged(4, **{**options, "chunk_ffn": False})).planned.peak
    chunks = draft(staged(4, **{**options, "chunk_ffn": True})).planned.peak
    assert chunks < (1 - chunking.LEAST_GAIN) * whole, "enough for a chunked loss; the budget decides here"
    assert not feed_forwards_chunked(staged(4, **options, budget=whole))
    assert feed_forwards_chunked(staged(4, **{**options, "chunk_ffn": True, "tokens": 16}))


@pytest.mark.usefixtures("no_size_is_small")
@pytest.mark.parametrize(("mode", "expected"), [("1.5:1", True), ("lossless", False)])
def test_where_memory_is_short_the_error_of_the_whole_is_worth_chunks(mode: str, expected: bool) -> None:
    """Chunks leave room for precise codecs at the same ratio; who has memory does not pay their matmuls."""
    options: dict[str, Any] = {"chunk_loss": False, "chunk_ffn": "auto", "tokens": 1024, "mode": mode}
    assert not feed_forwards_chunked(staged(4, **options))
    with memory_of_the_device(1):
        assert feed_forwards_chunked(staged(4, **options)) is expected


@pytest.mark.usefixtures("no_size_is_small")
def test_loss_and_feed_forwards_may_both_be_chunked_and_both_are_said() -> None:
    found = staged(4, chunk_loss=True, chunk_ffn=True, loss_chunk_bytes=16384)
    notes = " ".join(found.selection.notes)
    assert "logits and loss in" in notes and "4 feed-forwards in" in notes
    assert found.model.original is not None
    assert found.model.baseline_bytes == sum(found.model.original.baseline.values())


def test_accumulating_takes_a_tenth_of_a_feed_forwards_chunk() -> None:
    """Here two weights' gradients accumulate beside seven matmuls (SwiGLU: three beside eleven)."""
    found = staged(1, chunk_loss=False, chunk_ffn=False)
    (node,) = [n for n in found.captured.savable if is_feed_forward(found.captured, n)]
    region = FeedForwardFinder(found.captured, node).find()
    rows = rows_worth_a_chunk(region, named("h200"))
    share = 2 * share_of_matmuls(rows, named("h200"), 4, 7)
    assert share == pytest.approx(ACCUMULATING)
