"""Compute feed-forwards a few tokens at a time: lossless, for the matmuls before the activation once more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ciuic_compile.capture import CapturedGraph
from ciuic_compile.rows import RowRegion

from ._chunk_writer import write_chunks


@dataclass(frozen=True)
class ChunkFeedForward:
    """Write feed-forwards of a joint graph in chunks, one after the other, in a copy of the graph.

    Between two matmuls values are several times wider than the hidden states. The forward keeps none of them;
    the backward makes each chunk's again, from the hidden states, and uses them up before the next chunk
    begins. Gradients of weights and biases are accumulated in float32.

    Attributes:
        regions: each feed-forward, and in how many chunks; the last one may be smaller.
    """

    regions: tuple[tuple[RowRegion, int], ...]

    def run(self, captured: CapturedGraph) -> fx.Graph:
        """The rewritten copy of ``captured.graph``, in which the regions were found."""
        return write_chunks(captured, self.regions)
