"""INT4 groups in plain aten: what the kernels must equal, and what Inductor fuses.

The encoder works on the two halves of a group side by side (they share a byte), and the
decoder broadcasts shifts: neither slices or concatenates anything that was computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_compile.codecs._group import IntGroupCodec, dequantize_groups, to_groups
from ciuic_compile.codecs._quantize import quantize
from ciuic_compile.codecs.base import Encoded


def encode(flat: Tensor, codec: IntGroupCodec) -> Encoded:
    """Payload uint8 [groups, group_size / 2], scale and (affine) offset bfloat16 [groups]."""
    grouped = to_groups(flat, codec.group_size)
    halves = grouped.view(grouped.shape[0], 2, codec.group_size // 2)
    (low, high), scale, offset = quantize((halves[:, 0], halves[:, 1]), codec.levels, codec.symmetric)
    payload = (low | (high << 4)).to(torch.uint8)
    return (payload, scale) if offset is None else (payload, scale, offset)


def decode(encoded: Encoded, numel: int | torch.SymInt, dtype: torch.dtype, codec: IntGroupCodec) -> Tensor:
    """The first ``numel`` elements as a flat tensor of ``dtype``."""
    payload, *qparams = encoded
    shift = torch.arange(2, dtype=torch.int32, device=payload.device) * 4
    codes = (payload.to(torch.int32)[:, None, :] >> shift[None, :, None]) & 15
    return dequantize_groups(codes, qparams, numel, dtype, codec)
