"""Accumulate a wide embedding's gradient a few columns at a time: lossless, for less scratch memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ciuic_compile import compat, ops

from ._infra import Graphs, PassResult

aten = torch.ops.aten


@dataclass(frozen=True)
class AccumulateEmbedding:
    """Replace ``cast(index_put(zeros float32))``, the gradient of a bf16/fp16 embedding, by one operator.

    The accumulator is float32 and as large as two gradients, at the end of the backward, where all other
    gradients are alive (500 MiB at d=4096 and a vocabulary of 32,000). ``ops.embedding_gradient`` sums the
    same float32 values a sixteenth of the columns at a time. In FX, chunks do not help: Inductor fuses
    them back into one kernel with all accumulators alive.

    Attributes:
        min_bytes: accumulators smaller than this stay as they are.
    """

    min_bytes: int = 64 * 2**20

    def run(self, graphs: Graphs) -> PassResult:
        graph = graphs.backward.graph
        notes = []
        for node in graph.find_nodes(op="call_function", target=aten.index_put.default):
            if self.declines(node) is None:
                _replace(graph, node)
                notes.append(
                    f"{node.name}: gradient of an embedding summed in {ops.COLUMN_CHUNKS} column chunks"
                )
        return PassResult(bool(notes), tuple(notes))

    def declines(self, node: fx.Node) -> str | None:
        """Why this accumulation stays as it is, or None."""
        zeros, indices, _, accumulate = (*node.args, False)[:4]
        value = node.meta["val"]
        assert isinstance(zeros, fx.Node) and isinstance(indices, (list, tuple))
        if not accumulate or zeros.target is not aten.full.default or zeros.args[1] != 0:
            return "not an accumulation into zeros"
        if value.dim() != 2 or len(indices) != 1 or value.device.type != "cuda":
            return "not an embedding on a GPU"
        if compat.hint(value.numel()) * value.dtype.itemsize < self.min_bytes:
            return "smaller than min_bytes"
        users = list(node.users)
        if len(users) != 1 or users[0].target is not torch.ops.prims.convert_element_type.default:
            return "the accumulator itself is read"
        return (
            None if users[0].meta["val"].dtype.itemsize < value.dtype.itemsize else "the gradient is as wide"
        )


def _replace(graph: fx.Graph, node: fx.Node) -> None:
    (cast,) = node.users
    zeros, indices, values = node.args[:3]
    assert isinstance(zeros, fx.Node) and isinstance(indices, (list, tuple))
    size = zeros.args[0]
    assert isinstance(size, (list, tuple))
    with graph.inserting_before(cast):
        gradient = compat.call(
            graph, torch.ops.ciuic.embedding_gradient.default, (values, indices[0], size[0], cast.args[1])
        )
    cast.replace_all_uses_with(gradient)
    graph.erase_node(cast)
    graph.erase_node(node)
    if not zeros.users:
        graph.erase_node(zeros)
