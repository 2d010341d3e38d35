"""Stage 3b: where and in how many chunks the loss and feed-forwards are computed (docs/chunked-loss.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from . import compat
from .analyze import MemoryModel
from .capture import tensor
from .compat import packet
from .devices import DeviceProfile
from .feed_forward import FeedForwardFinder, is_feed_forward
from .passes import ChunkFeedForward, ChunkLoss
from .rows import LOSS_CHUNK, Declined, RowFinder, RowRegion
from .simulate import Peaks, tensor_bytes
from .types import TensorClass

aten = torch.ops.aten
MAX_CHUNKS = 32  # each is some thirty nodes to compile
#: Smaller chunks save little: accumulator and weights' gradient of such a head are as large.
CHUNK_BYTES = 64 * 2**20
#: Time to accumulate gradients of the weight that a chunk may take, as a share of its matmuls'.
ACCUMULATING = 0.1
#: Share of the peak that "auto" must gain. One matmul more is a quarter to a third of the head's time, which
#: is 5 to 10 % of the step of a model whose logits are large enough: less memory than time is no bargain.
LEAST_GAIN = 0.1


@dataclass(frozen=True)
class Chunking:
    """The pass to run, or None.

    Attributes:
        declined: sentences for the report, on what cannot be chunked.
        done: one more, true once the pass has run.
    """

    chunk: ChunkLoss | ChunkFeedForward | None
    declined: tuple[str, ...] = ()
    done: str = ""


def choose_chunks(model: MemoryModel) -> Chunking:
    """Choose one loss of the graph that can be computed in chunks; call again until there is none.

    Whether ``"auto"`` wants that is decided on the two plans: :func:`why_whole`.
    """
    config, notes = model.config, []
    candidates = [n for n in model.captured.savable if config.chunk_loss and _is_logits(model, n)]
    for node in sorted(candidates, key=_float32_bytes, reverse=True):
        size = _float32_bytes(node)
        if config.chunk_loss == "auto" and size <= (config.loss_chunk_bytes or CHUNK_BYTES):
            break
        try:
            region = RowFinder(model.captured, node).find()
            _check_operands(model, node)
        except Declined as why:
            notes.append(f"{node.name}: {size / 2**20:.1f} MiB of float32 logits are not chunked: {why}")
            continue
        fewest = 1 if config.loss_chunk_bytes else rows_worth_a_chunk(region, model.device)
        chunks = _count(size, region.rows, config.loss_chunk_bytes or CHUNK_BYTES, fewest)
        done = (
            f"{node.name}: logits and loss in {chunks} chunks of tokens: {size / 2**20:.1f} MiB of float32 "
            "logits are never all alive, for one more matmul in the backward"
        )
        return Chunking(ChunkLoss(region, chunks), tuple(notes), done)
    return Chunking(None, tuple(notes))


def choose_feed_forwards(model: MemoryModel) -> Chunking:
    """Choose all feed-forwards of the graph that can be computed in chunks.

    ``"auto"`` wants that only where ratio or budget need it: SwiGLU's two matmuls once more are two of
    eleven, some 15 % of a Llama's step, too much for a lower peak that nobody asked for.
    """
    captured, taken = model.captured, set[fx.Node]()
    regions: list[tuple[RowRegion, int]] = []
    notes: dict[str, str] = {}
    total = 0
    for node in captured.savable if model.config.chunk_ffn else ():
        size = tensor_bytes(node.meta.get("val"))
        if node in taken or not is_feed_forward(captured, node):
            continue
        if model.config.chunk_ffn == "auto" and size <= CHUNK_BYTES:
            continue
        try:
            region = FeedForwardFinder(captured, node).find()
            for source in region.sources:
                _check_operands(model, source)
        except Declined as why:
            notes.setdefault(str(why), f"{node.name}: its feed-forward is not chunked: {why}")
            continue
        taken.update(region.sources)
        fewest = rows_worth_a_chunk(region, model.device)
        regions.append((region, _count(size, region.rows, CHUNK_BYTES, fewest)))
        total += sum(tensor_bytes(n.meta["val"]) for n in region.sources if not captured.is_backward(n))
    if not regions:
        return Chunking(None, tuple(notes.values()))
    chunks = max(n for _, n in regions)
    done = (
        f"{len(regions)} feed-forward{'s' if len(regions) > 1 else ''} in {chunks} chunks of tokens: "
        f"{total / 2**20:.1f} MiB of hidden values are never all alive, for their matmuls once more"
    )
    return Chunking(ChunkFeedForward(tuple(regions)), tuple(notes.values()), done)


def rows_worth_a_chunk(region: RowRegion, device: DeviceProfile) -> float:
    """Rows from which on accumulating takes at most :data:`ACCUMULATING` of the time of a chunk's matmuls.

    Both grow with the weights (of one size), which cancel out. A chunk's product is written and read in the
    weight's dtype, the accumulator read and written in float32. Matmuls that the backward makes again count
    twice.
    """
    kinds = list(region.ends.values())
    if "weight" not in kinds:
        return 1.0
    itemsize: int = region.sources[0].meta["val"].dtype.itemsize
    moved = kinds.count("weight") * (2 * itemsize + 2 * max(4, itemsize))
    matmuls = len(region.sources) + region.made_again + kinds.count("weight") + kinds.count("rows")
    flop = 2 * matmuls
    return (moved / device.bytes_per_us) * device.flop_per_us(itemsize) / (ACCUMULATING * flop)


def why_whole(whole: Peaks, chunked: Peaks) -> str:
    """Why ``"auto"`` leaves a loss whole, given the peaks of both plans; empty where it does not."""
    if chunked.peak <= (1 - LEAST_GAIN) * whole.peak:
        return ""
    return (
        f"the simulated peak would be {chunked.peak / 2**20:.1f} instead of {whole.peak / 2**20:.1f} MiB, "
        f"not {LEAST_GAIN:.0%} less, for one more matmul"
    )


def _is_logits(model: MemoryModel, node: fx.Node) -> bool:
    """A matmul in the forward that no other matmul, convolution or attention follows."""
    value = tensor(node)
    if packet(node) not in (aten.mm, aten.addmm) or value is None or not value.dtype.is_floating_point:
        return False
    if node.meta.get(LOSS_CHUNK) or model.classes.leads_to_contraction(node):
        return False
    return model.classes.kind(node) in (TensorClass.LOSS, TensorClass.INPUT)


def _float32_bytes(node: fx.Node) -> int:
    value = tensor(node)
    return 0 if value is None else compat.hint(value.numel()) * 4


def _count(size: int, rows: int, chunk_bytes: int, fewest: float) -> int:
    """A power of two, at least two: chunks of at most ``chunk_bytes``, but of ``fewest`` rows or more."""
    chunks = 2
    while chunks < MAX_CHUNKS and size > chunks * chunk_bytes and rows >= 2 * chunks * fewest:
        chunks *= 2
    return chunks


def _check_operands(model: MemoryModel, logits: fx.Node) -> None:
    """The backward makes the matmul again: its weight and bias must then be what they were."""
    *bias, _, weight = logits.args
    for node in (*bias, weight):
        if node not in model.classes.from_parameters and node not in model.classes.exact:
            raise Declined(f"{node} is computed from activations")
        if node in model.captured.mutated:
            raise Declined(f"{node} is overwritten in the forward")
    if logits.kwargs:
        raise Declined("its bias is scaled")
