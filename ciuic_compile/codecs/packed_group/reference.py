"""Packed groups in plain aten: what the kernels must equal, and what Inductor fuses.

Encoding puts the bits that share bytes into one word and broadcasts a shift over its bytes; decoding
broadcasts shifts over the planes: neither slices or concatenates anything that was computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_compile.codecs._group import dequantize_groups, to_groups
from ciuic_compile.codecs._quantize import quantize
from ciuic_compile.codecs.base import Encoded
from ciuic_compile.codecs.packed_group.ops import PackedGroup


def encode(flat: Tensor, codec: PackedGroup) -> Encoded:
    """Payload uint8 [groups, group_size * bits / 8], scale and (affine) offset bfloat16 [groups]."""
    grouped = to_groups(flat, codec.group_size)
    (codes,), *qparams = quantize((grouped,), codec.levels, codec.symmetric)
    half = codec.parts // 2
    dtype = torch.int32 if codec.planes < 4 else torch.int64
    codes = codes.to(dtype).view(-1, codec.parts, codec.width)
    part = torch.arange(codec.parts, dtype=dtype, device=flat.device)[:, None]
    bits = (codes & 15) << (part % half * 8 + part // half * 4)
    if codec.bits > 4:
        bits = bits | ((codes >> 4) << (part * (codec.bits - 4) + half * 8))
    word = bits.sum(1, keepdim=True, dtype=dtype)
    plane = torch.arange(codec.planes, dtype=dtype, device=flat.device)[:, None]
    payload = ((word >> (plane * 8)) & 255).to(torch.uint8).view(-1, codec.planes * codec.width)
    return (payload, *(q for q in qparams if q is not None))


def decode(encoded: Encoded, numel: int | torch.SymInt, dtype: torch.dtype, codec: PackedGroup) -> Tensor:
    """The first ``numel`` elements as a flat tensor of ``dtype``."""
    payload, *qparams = encoded
    half, upper = codec.parts // 2, codec.bits - 4
    planes = payload.view(-1, 1, codec.planes, codec.width).to(torch.int32)
    part = torch.arange(codec.parts, dtype=torch.int32, device=payload.device).view(2, half, 1)
    codes = (planes[:, :, :half] >> (part // half * 4)) & 15
    if upper:
        codes = codes | (((planes[:, :, half:] >> (part * upper)) & (2**upper - 1)) << 4)
    return dequantize_groups(codes, qparams, numel, dtype, codec)
