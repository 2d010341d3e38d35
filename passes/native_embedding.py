"""Compute a wide embedding's gradient with torch's own kernel: lossless, for less scratch memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from ciuic_compile import compat, ops

from ._infra import Graphs, PassResult

aten = torch.ops.aten
prims = torch.ops.prims


class _Accumulation(NamedTuple):
    """``cast(zeros.index_put(indices, values * mask, accumulate=True))``."""

    zeros: fx.Node
    indices: fx.Node
    values: fx.Node
    mask: fx.Node | None
    cast: fx.Node


@dataclass(frozen=True)
class NativeEmbedding:
    """Replace Inductor's decomposition of a bf16 or fp16 embedding's gradient by the kernel it decomposed.

    Decomposed, it accumulates in float32, in a buffer as large as two gradients, at the end of the backward,
    where all other gradients are alive (500 MiB at d=4096 and a vocabulary of 32,000). torch's kernel sorts
    the indices and sums in float32 registers.

    Attributes:
        min_bytes: accumulators smaller than this stay as they are.
        devices: device types to do it on.
    """

    min_bytes: int = 64 * 2**20
    devices: tuple[str, ...] = ("cuda",)

    def run(self, graphs: Graphs) -> PassResult:
        graph = graphs.backward.graph
        notes = []
        for node in list(graph.nodes):
            found = _match(node)
            if found is not None and self.declines(node) is None:
                _replace(graph, node, found)
                notes.append(f"{node.name}: gradient of an embedding computed without a float32 accumulator")
        return PassResult(bool(notes), tuple(notes))

    def declines(self, node: fx.Node) -> str | None:
        """Why this accumulation stays as it is, or None."""
        value = node.meta["val"]
        if value.device.type not in self.devices:
            return "not on a GPU"
        if compat.hint(value.numel()) * value.dtype.itemsize < self.min_bytes:
            return "smaller than min_bytes"
        return None


def _match(node: fx.Node) -> _Accumulation | None:
    """torch 2.11 writes ``index_put``, torch 2.13 ``_unsafe_masked_index_put_accumulate``."""
    mask = None
    if node.target is aten.index_put.default and len(node.args) == 4 and node.args[3] is True:
        zeros, indices, values, _ = node.args
    elif node.target is aten._unsafe_masked_index_put_accumulate.default:
        zeros, mask, indices, values = node.args
    else:
        return None
    if not (isinstance(zeros, fx.Node) and zeros.target is aten.full.default and zeros.args[1] == 0):
        return None
    if not isinstance(indices, (list, tuple)) or len(indices) != 1 or node.meta["val"].dim() != 2:
        return None
    (index,), users = indices, list(node.users)
    if not isinstance(index, fx.Node) or not isinstance(values, fx.Node) or len(users) != 1:
        return None
    (cast,) = users
    if cast.target is not prims.convert_element_type.default:
        return None
    narrower = cast.meta["val"].dtype.itemsize < node.meta["val"].dtype.itemsize
    if not narrower or values.meta["val"].shape[:-1] != index.meta["val"].shape:
        return None
    return _Accumulation(zeros, index, values, mask if isinstance(mask, fx.Node) else None, cast)


def _replace(graph: fx.Graph, node: fx.Node, found: _Accumulation) -> None:
    values = found.values
    rows = node.meta["val"].shape[0]
    with graph.inserting_before(found.cast):
        if found.mask is not None:
            zero = compat.call(graph, aten.zeros_like.default, (values,))
            values = compat.call(graph, aten.where.self, (found.mask, values, zero))
        # rounded as eager rounds it, and in the kernel that makes it
        narrow = compat.call(graph, prims.convert_element_type.default, (values, found.cast.args[1]))
        arguments = (narrow, found.indices, compat.size_node(graph, rows))
        gradient = compat.call(graph, ops.EMBEDDING_GRADIENT, arguments)
    found.cast.replace_all_uses_with(gradient)
    for dead in (found.cast, node, found.zeros):
        if not dead.users:
            graph.erase_node(dead)
