"""Operators of our own that stay opaque to Inductor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("ciuic::embedding_gradient", mutates_args=())
def embedding_gradient(gradient: Tensor, indices: Tensor, rows: int) -> Tensor:
    """Gradient of an embedding table by torch's own kernel, which Inductor decomposes away.

    Args:
        gradient: [..., d] of the table's dtype, one row an index.
        indices: integers [...]; negative ones count from the end, as in ``index_put``; others clamp
            (their gradients are zero: torch masks them).
        rows: rows of the table.

    Returns:
        [rows, d]: row ``i`` is the sum, in float32, of the gradients whose index is ``i``, rounded once.
        Scratch: the sorted indices.
    """
    where = torch.where(indices < 0, indices + rows, indices).clamp(0, rows - 1)
    result: Tensor = torch.ops.aten.embedding_dense_backward.default(gradient, where, rows, -1, False)
    return result


@embedding_gradient.register_fake
def _(gradient: Tensor, indices: Tensor, rows: int) -> Tensor:
    return gradient.new_empty((rows, gradient.shape[-1]))


EMBEDDING_GRADIENT = torch.ops.ciuic.embedding_gradient.default


@torch.library.custom_op("ciuic::after", mutates_args=())
def after(x: Tensor, done: Sequence[Tensor]) -> Tensor:
    """A copy of ``x``, made once everything in ``done`` has been computed.

    Inductor orders and fuses by data alone; this makes an order a matter of data.
    """
    return x.clone()


@after.register_fake
def _(x: Tensor, done: Sequence[Tensor]) -> Tensor:
    return torch.empty_like(x)


AFTER = torch.ops.ciuic.after.default
