"""Packed groups in plain aten: what the kernels must equal, and what Inductor fuses.

The encoder works on the two halves of a group side by side (they share bytes), and the decoder broadcasts
shifts: neither concatenates. Only upper bits are sliced from what was computed, the codes in a byte each.
"""

from __future__ import annotations

from functools import reduce
from itertools import chain
from operator import or_

import torch
import torch.nn.functional as F
from torch import Tensor

from ciuic_compile.codecs._group import dequantize_groups, to_groups
from ciuic_compile.codecs._quantize import quantize
from ciuic_compile.codecs.base import Encoded
from ciuic_compile.codecs.packed_group.ops import PackedGroup


def encode(flat: Tensor, codec: PackedGroup) -> Encoded:
    """Payload uint8 [groups, group_size * bits / 8], scale and (affine) offset bfloat16 [groups]."""
    grouped = to_groups(flat, codec.group_size)
    halves = grouped.view(grouped.shape[0], 2, codec.group_size // 2)
    codes, scale, offset = quantize((halves[:, 0], halves[:, 1]), codec.levels, codec.symmetric)
    low, high = (c.to(torch.uint8) for c in codes)
    payload = (low & 15) | (high << 4)
    if codec.bits > 4:
        split = ((half >> 4).view(-1, codec.parts // 2, codec.width).unbind(1) for half in (low, high))
        rest = reduce(or_, (part << (m * (codec.bits - 4)) for m, part in enumerate(chain(*split))))
        # Zeros beside both, where the other is: Inductor computes that in place, and a `cat` through buffers.
        payload = F.pad(payload, (0, codec.width)) | F.pad(rest, (codec.group_size // 2, 0))
    return (payload, scale) if offset is None else (payload, scale, offset)


def decode(encoded: Encoded, numel: int | torch.SymInt, dtype: torch.dtype, codec: PackedGroup) -> Tensor:
    """The first ``numel`` elements as a flat tensor of ``dtype``."""
    payload, *qparams = encoded
    half, upper = codec.group_size // 2, codec.bits - 4
    shared = payload.to(torch.int32)[:, None, :]
    bits = [(shared[..., :half] >> _shifts(2, 4, payload.device)) & 15]
    if upper:
        rest = (shared[..., half:] >> _shifts(codec.parts, upper, payload.device)) & (2**upper - 1)
        bits.append(rest << 4)
    return dequantize_groups(bits, qparams, numel, dtype, codec)


def _shifts(count: int, bits: int, device: torch.device) -> Tensor:
    """``0, bits, 2 bits, ...``, one for each row of what shares a byte."""
    return torch.arange(count, dtype=torch.int32, device=device)[:, None] * bits
