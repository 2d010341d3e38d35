"""Stage 3b: whether, where and in how many chunks the loss is computed (docs/chunked-loss.md)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from . import compat
from .analyze import MemoryModel
from .capture import tensor
from .compat import packet
from .passes import ChunkLoss
from .rows import LOSS_CHUNK, Declined, RowFinder, RowRegion, shape_of
from .types import TensorClass

aten = torch.ops.aten
MAX_CHUNKS = 32  # each is some thirty nodes to compile
#: float32 logits must take this much more than what chunks need in their place.
WORTH = 1.5


@dataclass(frozen=True)
class Chunking:
    """The pass to run, or None, and sentences for the report."""

    chunk: ChunkLoss | None
    notes: tuple[str, ...] = ()


def choose_chunks(model: MemoryModel) -> Chunking:
    """Choose one loss of the graph that is to be computed in chunks; call again until there is none."""
    config, notes = model.config, []
    candidates = [n for n in model.captured.savable if config.chunk_loss and _is_logits(model, n)]
    for node in sorted(candidates, key=_float32_bytes, reverse=True):
        size = _float32_bytes(node)
        if config.chunk_loss == "auto" and size <= config.loss_chunk_bytes:
            break
        try:
            region = RowFinder(model.captured, node).find()
            _check_operands(model, node)
            chunks = _count(size, region.rows, config.loss_chunk_bytes)
            if config.chunk_loss == "auto":
                _check_worth(region, size, chunks)
        except Declined as why:
            notes.append(f"{node.name}: {size / 2**20:.1f} MiB of float32 logits are not chunked: {why}")
            continue
        note = (
            f"{node.name}: logits and loss in {chunks} chunks of tokens: {size / 2**20:.1f} MiB of float32 "
            "logits are never all alive, for one more matmul in the backward"
        )
        return Chunking(ChunkLoss(region, chunks), (*notes, note))
    return Chunking(None, tuple(notes))


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


def _count(size: int, rows: int, chunk_bytes: int) -> int:
    chunks = 2
    while chunks < min(MAX_CHUNKS, rows) and size > chunks * chunk_bytes:
        chunks *= 2
    return chunks


def _check_operands(model: MemoryModel, logits: fx.Node) -> None:
    """The backward makes the logits again: their weight and bias must then be what they were."""
    *bias, _, weight = logits.args
    for node in (*bias, weight):
        if node not in model.classes.from_parameters and node not in model.classes.exact:
            raise Declined(f"{node} is computed from activations")
        if node in model.captured.mutated:
            raise Declined(f"{node} is overwritten in the forward")
    if logits.kwargs:
        raise Declined("its bias is scaled")


def _check_worth(region: RowRegion, size: int, chunks: int) -> None:
    """Raises :class:`Declined` where the gradients' float32 accumulators eat up what chunks save."""
    instead = size // chunks
    for node, kind in region.ends.items():
        if kind == "weight":
            rows, width = shape_of(node)
            instead += rows * width * (4 + node.meta["val"].dtype.itemsize)
    if size < WORTH * instead:
        raise Declined(f"chunks and the accumulator of the weight's gradient take {instead / 2**20:.1f} MiB")
