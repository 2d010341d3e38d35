"""Temporaries that external CUDA kernels allocate for themselves, in bytes, from the shapes they get.

Formulas after torch's sources (flash_api.cpp, attention_backward.cu, MHA.cpp, EmbeddingBackwardKernel.cu); a
test holds them against bench/results/workspaces-h200.json. Convolutions are missing: cuDNN decides.
"""

from __future__ import annotations

from collections.abc import Sequence

Shape = Sequence[int]
_FLOAT = 4
_ATTENTION_BACKWARD = {  # op: rows are padded to a multiple of, and grouped keys and values are expanded
    "flash_attention_backward": (128, True),
    "efficient_attention_backward": (64, False),
    "cudnn_attention_backward": (1, True),
}
_SORTED_BY_BLOCKS = 3072  # tokens up to which an embedding's gradient needs no sorting


def workspace_bytes(op: str, shapes: Sequence[Shape], itemsize: int) -> int:
    """Bytes that ``op`` allocates beside its results; 0 where nothing is known about it.

    Args:
        op: e.g. ``"aten._scaled_dot_product_flash_attention_backward.default"``.
        shapes: of its tensor arguments, in order.
        itemsize: of the first one's dtype, in bytes.
    """
    for name, (row_block, expands) in _ATTENTION_BACKWARD.items():
        if name in op:
            return _attention(shapes, itemsize, row_block, expands)
    if "embedding_dense_backward" in op or "ciuic.embedding_gradient" in op:
        return _embedding(shapes[0], shapes[1])
    return 0


def _attention(shapes: Sequence[Shape], itemsize: int, row_block: int, expands: bool) -> int:
    """The query gradient in float32 and one float a row; keys and values of grouped queries one by one."""
    (batch, heads, rows, size), (_, kv_heads, keys, _) = shapes[1], shapes[2]
    padded = -(-rows // row_block) * row_block
    expanded = 2 * batch * heads * keys * size * itemsize if expands and kv_heads != heads else 0
    return batch * heads * padded * (size + 1) * _FLOAT + expanded


def _embedding(gradient: Shape, indices: Shape) -> int:
    """Sorted copies of the indices, and a float32 row for each run of up to 10 equal ones."""
    tokens = 1
    for length in indices:
        tokens *= length
    if tokens <= _SORTED_BY_BLOCKS:
        return 0
    return (tokens + tokens // 10) * gradient[-1] * _FLOAT + 6 * 8 * tokens
