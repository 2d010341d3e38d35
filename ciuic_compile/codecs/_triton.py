# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""Triton pieces shared by the integer codecs: the arithmetic of ``_quantize.py``, and the launch seam.

Importing this needs triton. The results equal the reference bit for bit; where the compiler could
contract a product and a sum into one fused multiply-add, either the product is exact (an integer
of up to 8 bits times a bfloat16, a power of two) or a ``minimum`` stands between the two.
Values that need special care (NaN, Inf, results beyond the output type) are handled in a branch that a
program enters only when its own groups have some, so ordinary data does not pay for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction

from ciuic_compile.codecs._quantize import Levels, largest_scale

SCALE_FLOOR: tl.constexpr = tl.constexpr(2.0**-125)
JUST_BELOW_2: tl.constexpr = tl.constexpr(2.0 - 2.0**-20)
BF16_MAX: tl.constexpr = tl.constexpr(3.3895313892515355e38)
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to integer, ties to even
# Triton 3.6's interpreter truncates to bfloat16 and flushes its subnormals; there we convert by hand.
BY_HAND: tl.constexpr = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def widen(x):
    """Exact conversion to float32."""
    if BY_HAND and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Convert float32 to ``dtype``, to nearest, ties to even."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def load_groups(ptr, offsets, numel, full):
    """Load float32 values, zeros from ``numel`` on; ``full`` means no masks, which prevent wide loads."""
    if full:
        x = tl.load(ptr + offsets)
    else:
        x = tl.load(ptr + offsets, mask=offsets < numel, other=0.0)
    return widen(x)


@triton.jit
def store_groups(ptr, offsets, value, numel, full):
    """Store ``value`` at those ``offsets`` that are below ``numel``; no masks when ``full``."""
    value = narrow(value, ptr.dtype.element_ty)
    if full:
        tl.store(ptr + offsets, value)
    else:
        tl.store(ptr + offsets, value, mask=offsets < numel)


@triton.jit
def has_special(x):
    """Whether each row of ``x`` holds a NaN or an Inf: only those times zero are not zero.

    Multiplications are where a quantizer has time to spare; comparisons run at half their rate.
    """
    return tl.sum(x * 0.0, 1) != 0.0


@triton.jit
def finite_or(x, other):
    """``x`` with every NaN and Inf replaced by ``other``."""
    return tl.where(tl.abs(x) < float("inf"), x, other)


@triton.jit
def round_up_bf16(x):
    """See _quantize.round_up_bf16."""
    return ((x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def round_down_bf16(x):
    """See _quantize.round_down_bf16."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    rounded = tl.where(bits < 0, bits + 0xFFFF, bits) & -0x10000
    return tl.maximum(rounded.to(tl.float32, bitcast=True), -BF16_MAX)


@triton.jit
def symmetric_scale(
    amax,
    special,
    TOP: tl.constexpr,
    SPECIAL_TOP: tl.constexpr,
    BOUND: tl.constexpr,
    SPECIAL_BOUND: tl.constexpr,
):
    """Scale from the largest finite magnitude of each group."""
    raw = tl.where(special, amax * (1.0 / SPECIAL_TOP), amax * (1.0 / TOP))
    bound = tl.where(special, SPECIAL_BOUND, BOUND)
    return tl.maximum(tl.minimum(round_up_bf16(raw), bound), SCALE_FLOOR)


@triton.jit
def affine_scale(
    smallest, largest, special, TOP: tl.constexpr, SPECIAL_TOP: tl.constexpr, LIMIT: tl.constexpr
):
    """Scale and offset from the finite extremes of each group."""
    offset = round_down_bf16(smallest)
    half = 0.5 * largest - 0.5 * offset
    raw = tl.where(special, half * (2.0 / SPECIAL_TOP), half * (2.0 / TOP))
    room = 0.5 * LIMIT - 0.5 * offset
    bound = round_down_bf16(
        tl.where(special, room * (JUST_BELOW_2 / SPECIAL_TOP), room * (JUST_BELOW_2 / TOP))
    )
    return tl.maximum(tl.minimum(round_up_bf16(raw), bound), SCALE_FLOOR), offset


@triton.jit
def round_code(v, top, BIAS: tl.constexpr):
    """int32 whose low bits are round(min(v, top)) + BIAS in two's complement, for v >= -(top + 0.49)."""
    return (tl.minimum(v, top[:, None]) + (ROUNDER + BIAS)).to(tl.int32, bitcast=True)


@triton.jit
def special_code(x, code, NAN: tl.constexpr, POS: tl.constexpr, NEG: tl.constexpr):
    """Put the reserved codes where ``x`` is NaN or Inf."""
    code = tl.where(x == float("inf"), POS, code)
    code = tl.where(x == float("-inf"), NEG, code)
    return tl.where(x != x, NAN, code)


@triton.jit
def special_value(v, code, special, NAN: tl.constexpr, POS: tl.constexpr, NEG: tl.constexpr):
    """Put NaN and Inf where a group that has some holds their codes."""
    v = tl.where(special[:, None] & (code == POS), float("inf"), v)
    v = tl.where(special[:, None] & (code == NEG), float("-inf"), v)
    return tl.where(special[:, None] & (code == NAN), float("nan"), v)


@triton.jit
def affine_value(code, scale, offset):
    """Values of affine codes, by way of halves so that nothing overflows on the way."""
    half = code.to(tl.float32) * (tl.abs(scale) * 0.5)[:, None] + (offset * 0.5)[:, None]
    return half + half


@triton.jit
def clamp_finite(v, LIMIT: tl.constexpr):
    """``v`` with its finite values clamped to +-LIMIT."""
    return tl.where(tl.abs(v) < float("inf"), tl.minimum(tl.maximum(v, -LIMIT), LIMIT), v)


INTERPRETED: bool = isinstance(has_special, InterpretedFunction)
"""True when triton was imported with TRITON_INTERPRET=1: kernels then run on CPU tensors."""

ENCODE_TILE = 8192
DECODE_TILE = 4096
"""Bytes of the original tensor that one program handles, as 16-byte accesses; docs/numerics-codecs.md has
the measurement behind both. Nothing is autotuned."""

PART_TILE = 2048
"""Bytes of it that one part of its groups has at least (packed_group): 16 for each of 128 threads."""


def block_groups(tile: int, dtype: torch.dtype, group_size: int) -> int:
    """Groups of ``dtype`` elements that fill ``tile`` bytes; a power of two."""
    return max(1, tile // (dtype.itemsize * group_size))


def scale_bounds(levels: Levels, dtype: torch.dtype) -> dict[str, float]:
    """The constexprs of a symmetric encoder for data of ``dtype``."""
    return {
        "BOUND": largest_scale(dtype, levels.top),
        "SPECIAL_BOUND": largest_scale(dtype, levels.special_top),
    }


def clamp_limit(dtype: torch.dtype) -> float:
    """What a decoder clamps to: only float16 needs it, see :func:`largest_scale`."""
    return float(torch.finfo(torch.float16 if dtype == torch.float16 else torch.float32).max)


def launch(kernel: Any, programs: int | torch.SymInt, *args: Any, **constexprs: Any) -> None:
    """Run ``kernel`` on a one-dimensional grid, or record it when a graph is being traced.

    Traced (make_fx, torch.compile) it becomes a ``triton_kernel_wrapper`` node that Inductor sees
    through; eagerly it launches; under the interpreter it is called directly, because ``wrap_triton``
    refuses interpreted kernels on torch 2.11.
    """
    runner: Callable[..., Any] = kernel if INTERPRETED else torch.library.wrap_triton(kernel)
    runner[(programs,)](*args, **constexprs)  # type: ignore[index]
