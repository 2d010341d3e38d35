"""Compute logits and loss a few tokens at a time: lossless, never all alive, for one matmul more."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ciuic_compile import compat
from ciuic_compile.capture import CapturedGraph
from ciuic_compile.rows import RowRegion, is_wide

from ._chunk_writer import ChunkWriter


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
        graph, copied = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in captured.graph.nodes:
            copied[node] = graph.node_copy(node, copied.__getitem__)
        region = self.region.renamed(copied)
        late = {copied[n] for n in captured.order if n.op != "output" and captured.is_backward(n)}
        order = {node: i for i, node in enumerate(graph.nodes)}
        size = -(-region.rows // self.chunks)
        bounds = [(r, min(r + size, region.rows)) for r in range(0, region.rows, size)]
        forward = [n for n in region.labels if n not in late]
        backward = [n for n in (*region.labels, *region.ends) if n in late]
        stops = [
            max({*nodes, *(i for n in nodes for i in n.all_input_nodes)}, key=order.__getitem__).next
            for nodes in (forward, backward)
        ]
        writer = ChunkWriter(graph, region, late)
        with graph.inserting_before(stops[0]):
            writer.statistics([n for n in forward if not is_wide(region.labels[n])], bounds)
        with graph.inserting_before(stops[1]):
            inner = [n for n in backward if n in region.labels and not is_wide(region.labels[n])]
            writer.gradients(inner, bounds)
        for node, whole in writer.whole.items():
            node.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in writer.made)
        compat.sort(graph)
        graph.eliminate_dead_code()
        graph.lint()
        return graph
