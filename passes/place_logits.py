"""Make each chunk's logits again right before the backward reads them, so that one chunk is alive at a time."""

from __future__ import annotations

from dataclasses import dataclass

from ciuic_compile.rows import LOSS_CHUNK

from ._infra import Graphs, PassResult


@dataclass(frozen=True)
class PlaceLogits:
    """Move the marked matmuls before their first reader in the backward.

    Torch's partitioner puts what does not depend on the gradients where the forward computed it: before the
    first chunk's backward, all chunks at once.
    """

    def run(self, graphs: Graphs) -> PassResult:
        order = {node: i for i, node in enumerate(graphs.backward.graph.nodes)}
        changed = False
        for node in list(order):
            if not node.meta.get(LOSS_CHUNK):
                continue
            first = min(node.users, key=order.__getitem__)
            if first.prev is not node:
                first.prepend(node)
                changed = True
        return PassResult(changed)

