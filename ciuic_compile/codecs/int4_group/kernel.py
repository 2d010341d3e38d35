# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""INT4 groups in Triton: each program reads a tile of groups once and writes it once.

The two halves of a group share bytes, so a program loads them as two tiles and never shuffles elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_compile.codecs import _triton as core
from ciuic_compile.codecs._group import IntGroupCodec, group_count
from ciuic_compile.codecs._quantize import decode_limit
from ciuic_compile.codecs._triton import (
    affine_scale,
    affine_value,
    clamp_finite,
    finite_or,
    has_special,
    load_groups,
    narrow,
    round_code,
    special_code,
    special_value,
    store_groups,
    symmetric_scale,
    widen,
)
from ciuic_compile.codecs.base import Encoded


@triton.jit
def encode_symmetric_kernel(
    x_ptr,
    payload_ptr,
    scale_ptr,
    numel,
    groups,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUND: tl.constexpr,
    SPECIAL_BOUND: tl.constexpr,
):
    """Quantize BLOCK groups of G floats: packed payload and bfloat16 scales."""
    H: tl.constexpr = G // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    column = tl.arange(0, H)[None, :]
    full = (first + BLOCK) * G <= numel
    x0 = load_groups(x_ptr, row[:, None] * G + column, numel, full)
    x1 = load_groups(x_ptr, row[:, None] * G + (H + column), numel, full)
    special = has_special(x0 * 0.0 + x1)
    amax = tl.max(tl.maximum(tl.abs(x0), tl.abs(x1)), 1)
    any_special = tl.max(special.to(tl.int32), 0) > 0
    f0, f1 = x0, x1
    if any_special:
        f0 = finite_or(x0, 0.0)
        f1 = finite_or(x1, 0.0)
        amax = tl.max(tl.maximum(tl.abs(f0), tl.abs(f1)), 1)
    scale = symmetric_scale(amax, special, 7, 6, BOUND, SPECIAL_BOUND)
    inverse = tl.math.div_rn(1.0, scale)[:, None]
    top = tl.where(special, 6.0, 7.0)
    code0 = round_code(f0 * inverse, top, 8)
    code1 = round_code(f1 * inverse, top, 8)
    if any_special:
        code0 = special_code(x0, code0, 0, 15, 1)
        code1 = special_code(x1, code1, 0, 15, 1)
    packed = ((code0 & 15) | (code1 << 4)).to(tl.uint8)
    tl.store(payload_ptr + (row[:, None] * H + column), packed, mask=(row < groups)[:, None])
    tl.store(scale_ptr + row, narrow(tl.where(special, -scale, scale), tl.bfloat16), mask=row < groups)


@triton.jit
def encode_affine_kernel(
    x_ptr,
    payload_ptr,
    scale_ptr,
    offset_ptr,
    numel,
    groups,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Quantize BLOCK groups of G floats: packed payload, bfloat16 scales and offsets."""
    H: tl.constexpr = G // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    column = tl.arange(0, H)[None, :]
    full = (first + BLOCK) * G <= numel
    x0 = load_groups(x_ptr, row[:, None] * G + column, numel, full)
    x1 = load_groups(x_ptr, row[:, None] * G + (H + column), numel, full)
    special = has_special(x0 * 0.0 + x1)
    any_special = tl.max(special.to(tl.int32), 0) > 0
    f0, f1 = x0, x1
    if any_special:
        smallest = tl.min(tl.minimum(finite_or(x0, float("inf")), finite_or(x1, float("inf"))), 1)
        largest = tl.max(tl.maximum(finite_or(x0, float("-inf")), finite_or(x1, float("-inf"))), 1)
        empty = smallest > largest
        smallest = tl.where(empty, 0.0, smallest)
        largest = tl.where(empty, 0.0, largest)
        f0 = finite_or(x0, 0.0)
        f1 = finite_or(x1, 0.0)
    else:
        smallest = tl.min(tl.minimum(x0, x1), 1)
        largest = tl.max(tl.maximum(x0, x1), 1)
    scale, offset = affine_scale(smallest, largest, special, 15, 12, LIMIT)
    inverse = 2.0 * tl.math.div_rn(1.0, scale)[:, None]
    half = 0.5 * offset[:, None]
    top = tl.where(special, 12.0, 15.0)
    v0 = (0.5 * f0 - half) * inverse
    v1 = (0.5 * f1 - half) * inverse
    if any_special:  # where zeros stand for NaN and Inf, and only there, v may leave the codes' range
        v0 = tl.maximum(v0, 0.0)
        v1 = tl.maximum(v1, 0.0)
    code0 = round_code(v0, top, 0)
    code1 = round_code(v1, top, 0)
    if any_special:
        code0 = special_code(x0, code0, 14, 15, 13)
        code1 = special_code(x1, code1, 14, 15, 13)
    packed = ((code0 & 15) | (code1 << 4)).to(tl.uint8)
    tl.store(payload_ptr + (row[:, None] * H + column), packed, mask=(row < groups)[:, None])
    tl.store(scale_ptr + row, narrow(tl.where(special, -scale, scale), tl.bfloat16), mask=row < groups)
    tl.store(offset_ptr + row, narrow(offset, tl.bfloat16), mask=row < groups)


@triton.jit
def decode_symmetric_kernel(
    payload_ptr, scale_ptr, out_ptr, numel, groups, G: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr
):
    """Dequantize BLOCK groups of G symmetric codes into ``out_ptr``'s type."""
    H: tl.constexpr = G // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    column = tl.arange(0, H)[None, :]
    scale = widen(tl.load(scale_ptr + row, mask=row < groups, other=0.0))
    packed = tl.load(payload_ptr + (row[:, None] * H + column), mask=(row < groups)[:, None], other=0)
    code0 = (packed & 15).to(tl.int32)
    code1 = (packed >> 4).to(tl.int32)
    special = scale < 0.0
    careful = special | (tl.abs(scale) * 7.0 > LIMIT)
    if tl.max(careful.to(tl.int32), 0) > 0:
        step = tl.abs(scale)[:, None]
        v0 = clamp_finite((code0 - 8).to(tl.float32) * step, LIMIT)
        v1 = clamp_finite((code1 - 8).to(tl.float32) * step, LIMIT)
        v0 = special_value(v0, code0, special, 0, 15, 1)
        v1 = special_value(v1, code1, special, 0, 15, 1)
    else:
        v0 = (code0 - 8).to(tl.float32) * scale[:, None]
        v1 = (code1 - 8).to(tl.float32) * scale[:, None]
    full = (first + BLOCK) * G <= numel
    store_groups(out_ptr, row[:, None] * G + column, v0, numel, full)
    store_groups(out_ptr, row[:, None] * G + (H + column), v1, numel, full)


@triton.jit
def decode_affine_kernel(
    payload_ptr,
    scale_ptr,
    offset_ptr,
    out_ptr,
    numel,
    groups,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Dequantize BLOCK groups of G affine codes into ``out_ptr``'s type."""
    H: tl.constexpr = G // 2
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    column = tl.arange(0, H)[None, :]
    scale = widen(tl.load(scale_ptr + row, mask=row < groups, other=0.0))
    offset = widen(tl.load(offset_ptr + row, mask=row < groups, other=0.0))
    packed = tl.load(payload_ptr + (row[:, None] * H + column), mask=(row < groups)[:, None], other=0)
    code0 = (packed & 15).to(tl.int32)
    code1 = (packed >> 4).to(tl.int32)
    special = scale < 0.0
    # half of float32's range: beyond it, only the way by halves cannot overflow
    careful = special | (tl.abs(scale) * 15.0 + tl.abs(offset) > 0.5 * LIMIT)
    if tl.max(careful.to(tl.int32), 0) > 0:
        v0 = clamp_finite(affine_value(code0, scale, offset), LIMIT)
        v1 = clamp_finite(affine_value(code1, scale, offset), LIMIT)
        v0 = special_value(v0, code0, special, 14, 15, 13)
        v1 = special_value(v1, code1, special, 14, 15, 13)
    else:
        v0 = code0.to(tl.float32) * scale[:, None] + offset[:, None]
        v1 = code1.to(tl.float32) * scale[:, None] + offset[:, None]
    full = (first + BLOCK) * G <= numel
    store_groups(out_ptr, row[:, None] * G + column, v0, numel, full)
    store_groups(out_ptr, row[:, None] * G + (H + column), v1, numel, full)


def encode(flat: Tensor, codec: IntGroupCodec) -> Encoded:
    """Payload uint8 [groups, group_size / 2], scale and (affine) offset bfloat16 [groups]."""
    numel, size = flat.shape[0], codec.group_size
    groups = group_count(numel, size)
    payload = torch.empty((groups, size // 2), dtype=torch.uint8, device=flat.device)
    qparams = tuple(
        torch.empty((groups,), dtype=torch.bfloat16, device=flat.device)
        for _ in ("scale", "offset")[: 1 if codec.symmetric else 2]
    )
    encoded = (payload, *qparams)
    kernel = encode_symmetric_kernel if codec.symmetric else encode_affine_kernel
    block = core.block_groups(core.ENCODE_TILE, flat.dtype, size)
    bounds = (
        core.scale_bounds(codec.levels, flat.dtype)
        if codec.symmetric
        else {"LIMIT": decode_limit(flat.dtype)}
    )
    core.launch(
        kernel, group_count(groups, block), flat, *encoded, numel, groups, G=size, BLOCK=block, **bounds
    )
    return encoded


def decode(encoded: Encoded, numel: int | torch.SymInt, dtype: torch.dtype, codec: IntGroupCodec) -> Tensor:
    """The first ``numel`` elements as a flat tensor of ``dtype``."""
    out = torch.empty((numel,), dtype=dtype, device=encoded[0].device)
    groups, size = encoded[0].shape[0], codec.group_size
    kernel = decode_symmetric_kernel if codec.symmetric else decode_affine_kernel
    block, limit = core.block_groups(core.DECODE_TILE, dtype, size), core.clamp_limit(dtype)
    programs = group_count(groups, block)
    core.launch(kernel, programs, *encoded, out, numel, groups, G=size, BLOCK=block, LIMIT=limit)
    return out
