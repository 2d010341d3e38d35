# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005 (tuples grow by +, the one way that Triton compiles)
"""Packed groups in Triton: each program reads a tile of groups once and writes it once.

The parts of a group share bytes, so a program holds each as a tile of its own (tuples of tiles, unrolled when
it is compiled) and never shuffles elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_compile.codecs import _triton as core
from ciuic_compile.codecs._group import group_count
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
from ciuic_compile.codecs.packed_group.ops import PackedGroup


@triton.jit
def load_parts(ptr, row, numel, full, G: tl.constexpr, PARTS: tl.constexpr):
    """The PARTS of the groups ``row``, each a float32 tile [rows, G / PARTS]."""
    WIDTH: tl.constexpr = G // PARTS
    column = tl.arange(0, WIDTH)[None, :]
    parts = ()
    for m in tl.static_range(PARTS):
        parts = parts + (load_groups(ptr, row[:, None] * G + (m * WIDTH + column), numel, full),)
    return parts


@triton.jit
def store_parts(ptr, row, parts, numel, full, G: tl.constexpr, PARTS: tl.constexpr):
    """Store decoded parts where :func:`load_parts` finds them."""
    WIDTH: tl.constexpr = G // PARTS
    column = tl.arange(0, WIDTH)[None, :]
    for m in tl.static_range(PARTS):
        store_groups(ptr, row[:, None] * G + (m * WIDTH + column), parts[m], numel, full)


@triton.jit
def store_codes(ptr, row, groups, codes, G: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr):
    """Pack the low BITS of the parts' int32 codes into the groups' payload; see ops.PackedGroup."""
    WIDTH: tl.constexpr = G // PARTS
    HALF: tl.constexpr = PARTS // 2
    UPPER: tl.constexpr = BITS - 4
    offsets = row[:, None] * (G * BITS // 8) + tl.arange(0, WIDTH)[None, :]
    mask = (row < groups)[:, None]
    for k in tl.static_range(HALF):
        nibbles = ((codes[k] & 15) | (codes[k + HALF] << 4)).to(tl.uint8)
        tl.store(ptr + (offsets + k * WIDTH), nibbles, mask=mask)
    if UPPER > 0:
        upper = (codes[0] >> 4) & ((1 << UPPER) - 1)
        for m in tl.static_range(1, PARTS):
            upper |= ((codes[m] >> 4) & ((1 << UPPER) - 1)) << (m * UPPER)
        tl.store(ptr + (offsets + HALF * WIDTH), upper.to(tl.uint8), mask=mask)


@triton.jit
def load_codes(ptr, row, groups, G: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr):
    """The parts' codes, int32, from the groups' payload."""
    WIDTH: tl.constexpr = G // PARTS
    HALF: tl.constexpr = PARTS // 2
    UPPER: tl.constexpr = BITS - 4
    offsets = row[:, None] * (G * BITS // 8) + tl.arange(0, WIDTH)[None, :]
    mask = (row < groups)[:, None]
    planes = ()
    for k in tl.static_range(PARTS * BITS // 8):
        planes = planes + (tl.load(ptr + (offsets + k * WIDTH), mask=mask, other=0),)
    codes = ()
    for m in tl.static_range(PARTS):
        code = ((planes[m % HALF] >> (m // HALF * 4)) & 15).to(tl.int32)
        if UPPER > 0:
            upper = (planes[HALF] >> (m * UPPER)) & ((1 << UPPER) - 1)
            code |= upper.to(tl.int32) << 4
        codes = codes + (code,)
    return codes


@triton.jit
def any_part_special(parts, PARTS: tl.constexpr):
    """Whether each group holds a NaN or an Inf."""
    x = parts[0]
    for m in tl.static_range(1, PARTS):
        x = x * 0.0 + parts[m]
    return has_special(x)


@triton.jit
def finite_parts(parts, other, PARTS: tl.constexpr):
    """The parts with every NaN and Inf replaced by ``other``."""
    finite = ()
    for m in tl.static_range(PARTS):
        finite = finite + (finite_or(parts[m], other),)
    return finite


@triton.jit
def largest_magnitude(parts, PARTS: tl.constexpr):
    """Largest magnitude of each group."""
    most = tl.abs(parts[0])
    for m in tl.static_range(1, PARTS):
        most = tl.maximum(most, tl.abs(parts[m]))
    return tl.max(most, 1)


@triton.jit
def extremes(low, high, PARTS: tl.constexpr):
    """Smallest of the parts ``low`` and largest of the parts ``high`` in each group."""
    smallest, largest = low[0], high[0]
    for m in tl.static_range(1, PARTS):
        smallest = tl.minimum(smallest, low[m])
        largest = tl.maximum(largest, high[m])
    return tl.min(smallest, 1), tl.max(largest, 1)


@triton.jit
def special_codes(parts, codes, PARTS: tl.constexpr, NAN: tl.constexpr, POS: tl.constexpr, NEG: tl.constexpr):
    """Put the reserved codes where the parts hold NaN or Inf."""
    found = ()
    for m in tl.static_range(PARTS):
        found = found + (special_code(parts[m], codes[m], NAN, POS, NEG),)
    return found


@triton.jit
def not_negative(parts, PARTS: tl.constexpr):
    """The parts with zeros for what is below."""
    found = ()
    for m in tl.static_range(PARTS):
        found = found + (tl.maximum(parts[m], 0.0),)
    return found


@triton.jit
def symmetric_values(codes, scale, BIAS: tl.constexpr, PARTS: tl.constexpr):
    """Values of symmetric codes."""
    values = ()
    for m in tl.static_range(PARTS):
        values = values + ((codes[m] - BIAS).to(tl.float32) * scale[:, None],)
    return values


@triton.jit
def affine_values(codes, scale, offset, CAREFUL: tl.constexpr, PARTS: tl.constexpr):
    """Values of affine codes; CAREFUL: by way of halves, as ``affine_value`` does."""
    values = ()
    for m in tl.static_range(PARTS):
        if CAREFUL:
            values = values + (affine_value(codes[m], scale, offset),)
        else:
            values = values + (codes[m].to(tl.float32) * scale[:, None] + offset[:, None],)
    return values


@triton.jit
def special_values(
    values,
    codes,
    special,
    LIMIT: tl.constexpr,
    PARTS: tl.constexpr,
    NAN: tl.constexpr,
    POS: tl.constexpr,
    NEG: tl.constexpr,
):
    """Clamp finite values to +-LIMIT, and put NaN and Inf where special groups hold their codes."""
    found = ()
    for m in tl.static_range(PARTS):
        found = found + (special_value(clamp_finite(values[m], LIMIT), codes[m], special, NAN, POS, NEG),)
    return found


@triton.jit
def encode_symmetric_kernel(
    x_ptr,
    payload_ptr,
    scale_ptr,
    numel,
    groups,
    G: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BOUND: tl.constexpr,
    SPECIAL_BOUND: tl.constexpr,
):
    """Quantize BLOCK groups of G floats: packed payload and bfloat16 scales."""
    BIAS: tl.constexpr = 2 ** (BITS - 1)
    TOP: tl.constexpr = BIAS - 1
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    x = load_parts(x_ptr, row, numel, (first + BLOCK) * G <= numel, G, PARTS)
    special = any_part_special(x, PARTS)
    amax = largest_magnitude(x, PARTS)
    any_special = tl.max(special.to(tl.int32), 0) > 0
    finite = x
    if any_special:
        finite = finite_parts(x, 0.0, PARTS)
        amax = largest_magnitude(finite, PARTS)
    scale = symmetric_scale(amax, special, TOP, TOP - 1, BOUND, SPECIAL_BOUND)
    inverse = tl.math.div_rn(1.0, scale)[:, None]
    top = tl.where(special, TOP - 1.0, TOP * 1.0)
    codes = ()
    for m in tl.static_range(PARTS):
        codes = codes + (round_code(finite[m] * inverse, top, BIAS),)
    if any_special:
        codes = special_codes(x, codes, PARTS, 0, 2 * BIAS - 1, 1)
    store_codes(payload_ptr, row, groups, codes, G, BITS, PARTS)
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
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Quantize BLOCK groups of G floats: packed payload, bfloat16 scales and offsets."""
    TOP: tl.constexpr = 2**BITS - 1
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    x = load_parts(x_ptr, row, numel, (first + BLOCK) * G <= numel, G, PARTS)
    special = any_part_special(x, PARTS)
    any_special = tl.max(special.to(tl.int32), 0) > 0
    finite = x
    if any_special:
        smallest, largest = extremes(
            finite_parts(x, float("inf"), PARTS), finite_parts(x, float("-inf"), PARTS), PARTS
        )
        empty = smallest > largest
        smallest = tl.where(empty, 0.0, smallest)
        largest = tl.where(empty, 0.0, largest)
        finite = finite_parts(x, 0.0, PARTS)
    else:
        smallest, largest = extremes(x, x, PARTS)
    scale, offset = affine_scale(smallest, largest, special, TOP, TOP - 3, LIMIT)
    inverse = 2.0 * tl.math.div_rn(1.0, scale)[:, None]
    half = 0.5 * offset[:, None]
    top = tl.where(special, TOP - 3.0, TOP * 1.0)
    steps = ()
    for m in tl.static_range(PARTS):
        steps = steps + ((0.5 * finite[m] - half) * inverse,)
    if any_special:  # where zeros stand for NaN and Inf, and only there, a step may leave the codes' range
        steps = not_negative(steps, PARTS)
    codes = ()
    for m in tl.static_range(PARTS):
        codes = codes + (round_code(steps[m], top, 0),)
    if any_special:
        codes = special_codes(x, codes, PARTS, TOP - 1, TOP, TOP - 2)
    store_codes(payload_ptr, row, groups, codes, G, BITS, PARTS)
    tl.store(scale_ptr + row, narrow(tl.where(special, -scale, scale), tl.bfloat16), mask=row < groups)
    tl.store(offset_ptr + row, narrow(offset, tl.bfloat16), mask=row < groups)


@triton.jit
def decode_symmetric_kernel(
    payload_ptr,
    scale_ptr,
    out_ptr,
    numel,
    groups,
    G: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Dequantize BLOCK groups of G symmetric codes into ``out_ptr``'s type."""
    BIAS: tl.constexpr = 2 ** (BITS - 1)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    scale = widen(tl.load(scale_ptr + row, mask=row < groups, other=0.0))
    codes = load_codes(payload_ptr, row, groups, G, BITS, PARTS)
    special = scale < 0.0
    careful = special | (tl.abs(scale) * (BIAS - 1.0) > LIMIT)
    if tl.max(careful.to(tl.int32), 0) > 0:
        values = symmetric_values(codes, tl.abs(scale), BIAS, PARTS)
        values = special_values(values, codes, special, LIMIT, PARTS, 0, 2 * BIAS - 1, 1)
    else:
        values = symmetric_values(codes, scale, BIAS, PARTS)
    store_parts(out_ptr, row, values, numel, (first + BLOCK) * G <= numel, G, PARTS)


@triton.jit
def decode_affine_kernel(
    payload_ptr,
    scale_ptr,
    offset_ptr,
    out_ptr,
    numel,
    groups,
    G: tl.constexpr,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Dequantize BLOCK groups of G affine codes into ``out_ptr``'s type."""
    TOP: tl.constexpr = 2**BITS - 1
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    scale = widen(tl.load(scale_ptr + row, mask=row < groups, other=0.0))
    offset = widen(tl.load(offset_ptr + row, mask=row < groups, other=0.0))
    codes = load_codes(payload_ptr, row, groups, G, BITS, PARTS)
    special = scale < 0.0
    # half of float32's range: beyond it, only the way by halves cannot overflow
    careful = special | (tl.abs(scale) * (TOP * 1.0) + tl.abs(offset) > 0.5 * LIMIT)
    if tl.max(careful.to(tl.int32), 0) > 0:
        values = affine_values(codes, scale, offset, True, PARTS)
        values = special_values(values, codes, special, LIMIT, PARTS, TOP - 1, TOP, TOP - 2)
    else:
        values = affine_values(codes, scale, offset, False, PARTS)
    store_parts(out_ptr, row, values, numel, (first + BLOCK) * G <= numel, G, PARTS)


def shape(tile: int, dtype: torch.dtype, codec: PackedGroup) -> dict[str, Any]:
    """The constexprs that say how groups are laid out, and how many a program handles."""
    tile = max(tile, core.PART_TILE * codec.parts)
    block = core.block_groups(tile, dtype, codec.group_size)
    return {"G": codec.group_size, "BITS": codec.bits, "PARTS": codec.parts, "BLOCK": block}


def encode(flat: Tensor, codec: PackedGroup) -> Encoded:
    """Payload uint8 [groups, group_size * bits / 8], scale and (affine) offset bfloat16 [groups]."""
    numel = flat.shape[0]
    groups = group_count(numel, codec.group_size)
    payload = torch.empty((groups, codec.planes * codec.width), dtype=torch.uint8, device=flat.device)
    qparams = tuple(
        torch.empty((groups,), dtype=torch.bfloat16, device=flat.device)
        for _ in ("scale", "offset")[: 1 if codec.symmetric else 2]
    )
    encoded = (payload, *qparams)
    kernel = encode_symmetric_kernel if codec.symmetric else encode_affine_kernel
    tiling = shape(core.ENCODE_TILE, flat.dtype, codec)
    bounds = (
        core.scale_bounds(codec.levels, flat.dtype)
        if codec.symmetric
        else {"LIMIT": decode_limit(flat.dtype)}
    )
    programs = group_count(groups, tiling["BLOCK"])
    core.launch(kernel, programs, flat, *encoded, numel, groups, **tiling, **bounds)
    return encoded


def decode(encoded: Encoded, numel: int | torch.SymInt, dtype: torch.dtype, codec: PackedGroup) -> Tensor:
    """The first ``numel`` elements as a flat tensor of ``dtype``."""
    out = torch.empty((numel,), dtype=dtype, device=encoded[0].device)
    groups = encoded[0].shape[0]
    kernel = decode_symmetric_kernel if codec.symmetric else decode_affine_kernel
    tiling = shape(core.DECODE_TILE, dtype, codec)
    programs = group_count(groups, tiling["BLOCK"])
    core.launch(kernel, programs, *encoded, out, numel, groups, **tiling, LIMIT=core.clamp_limit(dtype))
    return out
