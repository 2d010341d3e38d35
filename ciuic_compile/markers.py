"""Marker calls that stand for encode and decode in graphs, until the pass ``LowerCodecs`` expands them.

They are real functions, so a graph is executable after every pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from ciuic_compile.codecs import get_codec


def encode(x: torch.Tensor, codec: str, order: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Encode ``x``, its dimensions in this order: (payload, qparams...)."""
    return get_codec(codec).encode(x.permute(*order))


def decode(
    encoded: Sequence[torch.Tensor],
    codec: str,
    shape: Sequence[int],
    order: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode to ``shape``, which is in the order ``order``, and put the dimensions back."""
    inverse = [order.index(d) for d in range(len(order))]
    return get_codec(codec).decode(tuple(encoded), shape, dtype).permute(inverse)


def storage_order(x: torch.Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest: permuted so, a dense tensor is contiguous."""
    from ciuic_compile.compat import hint

    return sorted(range(x.dim()), key=lambda d: (-hint(x.stride(d)), d))


def is_marker(node: fx.Node, function: object) -> bool:
    """Whether the node calls this marker."""
    return node.op == "call_function" and node.target is function
