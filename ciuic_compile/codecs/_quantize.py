"""The arithmetic of integer group quantization in plain aten; docs/numerics-codecs.md says why.

Everything is float32 with explicit bit manipulation where a rounding matters, because Inductor
may elide ``.to(bfloat16).to(float32)`` round trips. Only ops that Inductor lowers to pointwise code
and reductions; ``_triton.py`` holds the same arithmetic, equal bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

SCALE_FLOOR = 2.0**-125
"""Smallest stored scale; half of it is still a normal float32. Values well below it become 0."""

BF16_MAX = 3.3895313892515355e38
JUST_BELOW_2 = 2.0 - 2.0**-20
"""Twice the share that one step has of the room above an offset: not so much that roundings overflow."""

INF = float("inf")
NAN = float("nan")


@dataclass(frozen=True)
class Levels:
    """The integer codes of a format, as unsigned payload values.

    Finite codes are ``code = q + bias`` with q in [-top, top] (symmetric) or [0, top] (affine); in a
    group that holds a NaN or an Inf, ``special_top`` replaces ``top`` and three codes are reserved.
    """

    bias: int
    top: int
    special_top: int
    nan: int
    pos_inf: int
    neg_inf: int

    @staticmethod
    def of(bits: int, symmetric: bool) -> Levels:
        """The codes of a ``bits``-wide symmetric or affine format."""
        if symmetric:
            half = 2 ** (bits - 1)
            return Levels(half, half - 1, half - 2, nan=0, pos_inf=2 * half - 1, neg_inf=1)
        top = 2**bits - 1
        return Levels(0, top, top - 3, nan=top - 1, pos_inf=top, neg_inf=top - 2)


def largest_scale(dtype: torch.dtype, top: int) -> float:
    """Largest bfloat16 scale whose ``top`` steps stay finite in ``dtype``, so that decoding need not clamp.

    A value that it cuts off is less than a step from the largest of ``dtype``. float16 has no bound: there it
    would cut off more, so decoding to float16 clamps.
    """
    return _LARGEST_SCALE[dtype, top]


def decode_limit(dtype: torch.dtype) -> float:
    """Largest magnitude that decoding may produce for data of ``dtype`` before it rounds to ``dtype``."""
    return float(torch.finfo(torch.float32 if dtype == torch.float16 else dtype).max)


def _floor_bf16(value: float) -> float:
    """Largest bfloat16 (8 significant bits) not above a positive normal ``value``."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(math.ldexp(mantissa, 8)), exponent - 8)


# A table, because Dynamo traces through encode and cannot see through frexp.
_LARGEST_SCALE = {
    (dtype, top): _floor_bf16(decode_limit(dtype) / top)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for top in (127, 126, 31, 30, 15, 14, 7, 6)
}


def round_up_bf16(x: Tensor) -> Tensor:
    """Smallest bfloat16 value >= ``x``, as float32; ``x`` not negative, float32, below BF16_MAX."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def round_down_bf16(x: Tensor) -> Tensor:
    """Largest finite bfloat16 value <= ``x`` as float32 (the lowest where there is none); -0 becomes +0."""
    bits = torch.where(x == 0.0, 0.0, x).view(torch.int32)
    away = (bits + 0xFFFF) & -0x10000
    toward = bits & -0x10000
    return torch.where(bits < 0, away, toward).view(torch.float32).clamp_min(-BF16_MAX)


def quantize(
    parts: tuple[Tensor, ...], levels: Levels, symmetric: bool
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """Quantize groups whose elements lie along the last dimension of all ``parts`` together.

    Args:
        parts: float tensors [groups, k]; a row of all parts is one group.

    Returns:
        int32 codes [groups, k] for each part, the scale and (affine) the offset, bfloat16 [groups].
        The scale is negative in a group that holds a NaN or an Inf.
    """
    dtype = parts[0].dtype
    parts = tuple(p.to(torch.float32) for p in parts)
    finite = tuple(p.abs() < INF for p in parts)
    special = ~reduce(torch.logical_and, finite).all(1)
    top = torch.where(special, float(levels.special_top), float(levels.top))
    if symmetric:
        magnitude = (torch.where(f, p.abs(), 0.0) for f, p in zip(finite, parts, strict=True))
        amax = reduce(torch.maximum, magnitude).amax(1)
        raw = torch.where(special, amax * (1.0 / levels.special_top), amax * (1.0 / levels.top))
        bound = torch.where(
            special, largest_scale(dtype, levels.special_top), largest_scale(dtype, levels.top)
        )
        offset = None
    else:
        low = (torch.where(f, p, INF) for f, p in zip(finite, parts, strict=True))
        high = (torch.where(f, p, -INF) for f, p in zip(finite, parts, strict=True))
        smallest, largest = reduce(torch.minimum, low).amin(1), reduce(torch.maximum, high).amax(1)
        empty = smallest > largest  # nothing finite
        offset = round_down_bf16(torch.where(empty, 0.0, smallest))
        # Halves: max - min of a group may exceed the largest float32.
        half = 0.5 * torch.where(empty, 0.0, largest) - 0.5 * offset
        raw = torch.where(special, half * (2.0 / levels.special_top), half * (2.0 / levels.top))
        room = 0.5 * decode_limit(dtype) - 0.5 * offset
        share = torch.where(special, JUST_BELOW_2 / levels.special_top, JUST_BELOW_2 / levels.top)
        bound = round_down_bf16(room * share)
    scale = torch.minimum(round_up_bf16(raw), bound).clamp_min(SCALE_FLOOR)
    inverse = torch.reciprocal(scale)
    codes = []
    for part, is_finite in zip(parts, finite, strict=True):
        x = torch.where(is_finite, part, 0.0)
        if offset is None:
            v = torch.maximum(torch.minimum(x * inverse[:, None], top[:, None]), -top[:, None])
        else:
            v = (0.5 * x - 0.5 * offset[:, None]) * (2.0 * inverse)[:, None]
            v = torch.minimum(v, top[:, None]).clamp_min(0.0)
        code = v.round().to(torch.int32) + levels.bias
        code = torch.where(part == INF, levels.pos_inf, code)
        code = torch.where(part == -INF, levels.neg_inf, code)
        codes.append(torch.where(part != part, levels.nan, code))
    signed = torch.where(special, -scale, scale).to(torch.bfloat16)
    return tuple(codes), signed, None if offset is None else offset.to(torch.bfloat16)


def dequantize(
    code: Tensor, scale: Tensor, offset: Tensor | None, levels: Levels, dtype: torch.dtype
) -> Tensor:
    """Values of int32 ``code`` in ``dtype``; bfloat16 ``scale`` and ``offset`` broadcast against it.

    Inductor fuses this into what reads it, once for every element, so each operation counts
    (docs/numerics-codecs.md): encode bounds the scale, so that no clamp is needed but for float16.
    """
    signed = scale.to(torch.float32)
    step = signed.abs()
    q = (code - levels.bias).to(torch.float32)
    if offset is None:
        infinite = (signed < 0.0) & (q.abs() > levels.special_top)
        v = torch.where(q < -levels.top, NAN, q * torch.where(infinite, INF, step))
    else:
        half = q * (step * 0.5) + offset.to(torch.float32) * 0.5
        v = torch.where((signed < 0.0) & (q > levels.special_top), (q - levels.nan) * INF, half + half)
    if dtype == torch.float16:
        top = torch.finfo(dtype).max
        v = torch.where(v.abs() < INF, v.clamp(-top, top), v)
    return v.to(dtype)
