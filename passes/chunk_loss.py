"""Compute logits and loss a few tokens at a time: lossless, never all alive, for one matmul more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ciuic_compile.capture import CapturedGraph
from ciuic_compile.rows import RowRegion

from ._chunk_writer import write_chunks


@dataclass(frozen=True)
class ChunkLoss:
    """Write one region of a joint graph as ``chunks`` parts, one after the other, in a copy of the graph.

    The forward keeps one number a token of every statistic and loss; the backward makes each chunk's logits
    again. What is summed over tokens (gradients of weight and bias) is accumulated in float32.

    Attributes:
        region: what to compute in chunks.
        chunks: how many; the last one may be smaller.
    """

    region: RowRegion
    chunks: int

    def run(self, captured: CapturedGraph) -> fx.Graph:
        """The rewritten copy of ``captured.graph``, in which the region was found."""
        return write_chunks(captured, [(self.region, self.chunks)])
