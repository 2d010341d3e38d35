"""Operators of our own that stay opaque to Inductor."""

from __future__ import annotations

import torch
from torch import Tensor

COLUMN_CHUNKS = 16


@torch.library.custom_op("ciuic::embedding_gradient", mutates_args=())
def embedding_gradient(values: Tensor, indices: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Gradient of an embedding table: row ``indices[i]`` collects ``values[i]``, summed in float32.

    Args:
        values: float32 [..., d], one row an index.
        indices: integers [...]; negative ones count from the end, as in ``index_put``.
        rows: rows of the table.
        dtype: of the result.

    Returns:
        [rows, d] of ``dtype``, rounded once. Scratch: float32 [rows, d / 16].
    """
    flat = values.reshape(-1, values.shape[-1])
    where = indices.reshape(-1)
    where = torch.where(where < 0, where + rows, where)
    result = torch.empty(rows, flat.shape[1], dtype=dtype, device=values.device)
    step = -(-flat.shape[1] // COLUMN_CHUNKS)
    for start in range(0, flat.shape[1], step):
        columns = flat[:, start : start + step]
        total = torch.zeros(rows, columns.shape[1], dtype=torch.float32, device=values.device)
        result[:, start : start + step] = total.index_add_(0, where, columns.to(torch.float32))
    return result


@embedding_gradient.register_fake
def _(values: Tensor, indices: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    return values.new_empty((rows, values.shape[-1]), dtype=dtype)
