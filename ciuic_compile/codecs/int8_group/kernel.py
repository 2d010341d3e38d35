# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""INT8 groups in Triton: each program reads a tile of groups once and writes it once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ciuic_compile.codecs import _triton as core
from ciuic_compile.codecs._group import IntGroupCodec, group_count
from ciuic_compile.codecs._triton import (
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
def encode_kernel(
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
    """Quantize BLOCK groups of G floats: int8 payload and bfloat16 scales."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    offsets = row[:, None] * G + tl.arange(0, G)[None, :]
    x = load_groups(x_ptr, offsets, numel, (first + BLOCK) * G <= numel)
    special = has_special(x)
    amax = tl.max(tl.abs(x), 1)
    any_special = tl.max(special.to(tl.int32), 0) > 0
    finite = x
    if any_special:
        finite = finite_or(x, 0.0)
        amax = tl.max(tl.abs(finite), 1)
    scale = symmetric_scale(amax, special, 127, 126, BOUND, SPECIAL_BOUND)
    top = tl.where(special, 126.0, 127.0)
    v = finite * tl.math.div_rn(1.0, scale)[:, None]
    code = round_code(tl.maximum(v, -top[:, None]), top, 0)  # where a bounded scale cuts off half a step
    if any_special:
        code = special_code(x, code, -128, 127, -127)
    tl.store(payload_ptr + offsets, code.to(tl.int8), mask=(row < groups)[:, None])
    tl.store(scale_ptr + row, narrow(tl.where(special, -scale, scale), tl.bfloat16), mask=row < groups)


@triton.jit
def decode_kernel(
    payload_ptr, scale_ptr, out_ptr, numel, groups, G: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr
):
    """Dequantize BLOCK groups of G int8 codes into ``out_ptr``'s type."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    offsets = row[:, None] * G + tl.arange(0, G)[None, :]
    scale = widen(tl.load(scale_ptr + row, mask=row < groups, other=0.0))
    code = tl.load(payload_ptr + offsets, mask=(row < groups)[:, None], other=0)
    special = scale < 0.0
    careful = special | (tl.abs(scale) * 127.0 > LIMIT)
    if tl.max(careful.to(tl.int32), 0) > 0:
        v = clamp_finite(code.to(tl.float32) * tl.abs(scale)[:, None], LIMIT)
        v = special_value(v, code.to(tl.int32), special, -128, 127, -127)
    else:
        v = code.to(tl.float32) * scale[:, None]
    store_groups(out_ptr, offsets, v, numel, (first + BLOCK) * G <= numel)


def encode(flat: Tensor, codec: IntGroupCodec) -> Encoded:
    """Payload int8 [groups, group_size] and scale bfloat16 [groups] of a flat contiguous float tensor."""
    numel, size = flat.shape[0], codec.group_size
    groups = group_count(numel, size)
    payload = torch.empty((groups, size), dtype=torch.int8, device=flat.device)
    scale = torch.empty((groups,), dtype=torch.bfloat16, device=flat.device)
    block = core.block_groups(core.ENCODE_TILE, flat.dtype, size)
    programs = group_count(groups, block)
    bounds = core.scale_bounds(codec.levels, flat.dtype)
    core.launch(encode_kernel, programs, flat, payload, scale, numel, groups, G=size, BLOCK=block, **bounds)
    return payload, scale


def decode(encoded: Encoded, numel: int | torch.SymInt, dtype: torch.dtype, codec: IntGroupCodec) -> Tensor:
    """The first ``numel`` elements as a flat tensor of ``dtype``."""
    out = torch.empty((numel,), dtype=dtype, device=encoded[0].device)
    groups, size = encoded[0].shape[0], codec.group_size
    block, limit = core.block_groups(core.DECODE_TILE, dtype, size), core.clamp_limit(dtype)
    programs = group_count(groups, block)
    core.launch(decode_kernel, programs, *encoded, out, numel, groups, G=size, BLOCK=block, LIMIT=limit)
    return out
