"""INT8 groups in plain aten: what the kernels must equal, and what Inductor fuses."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_compile.codecs._group import IntGroupCodec, dequantize_groups, to_groups
from ciuic_compile.codecs._quantize import quantize
from ciuic_compile.codecs.base import Encoded


def encode(flat: Tensor, codec: IntGroupCodec) -> Encoded:
    """Payload int8 [groups, group_size] and scale bfloat16 [groups] of a flat float tensor."""
    (codes,), scale, _ = quantize((to_groups(flat, codec.group_size),), codec.levels, codec.symmetric)
    return (codes - codec.levels.bias).to(torch.int8), scale


def decode(encoded: Encoded, numel: int | torch.SymInt, dtype: torch.dtype, codec: IntGroupCodec) -> Tensor:
    """The first ``numel`` elements as a flat tensor of ``dtype``."""
    payload, scale = encoded
    codes = payload.to(torch.int32) + codec.levels.bias
    return dequantize_groups((codes,), (scale,), numel, dtype, codec)
