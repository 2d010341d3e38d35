"""Codecs and awkward tensors that every codec test runs over, and bitwise comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from ciuic_compile.codecs import get_codec
from ciuic_compile.codecs._group import IntGroupCodec

NAMES = (
    "int8_group32",
    "int8_group64",
    "int8_group256",
    "int6_group32",
    "int6_group64",
    "int6_group256_affine",
    "int5_group32",
    "int5_group64",
    "int5_group128_affine",
    "int4_group32",
    "int4_group64",
    "int4_group128",
    "int4_group32_affine",
    "int4_group64_affine",
    "int4_group128_affine",
)
CHOSEN = ("int8_group64", "int6_group64", "int5_group64", "int4_group64_affine", "int4_group64")
"""What the planner considers at the default group size."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NUMELS = (0, 1, 63, 64, 65, 1000, 20000)  # 20000: several programs of a kernel, and a tail


def codec_named(name: str) -> IntGroupCodec:
    """The codec, which must be an integer group codec."""
    codec = get_codec(name)
    assert isinstance(codec, IntGroupCodec)
    return codec


def awkward(numel: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normals, and where there is room: NaN, Inf, extremes of ``dtype``, subnormals, constants, zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(numel, generator=generator) * 3).to(dtype)
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    if numel >= 63:
        x[3], x[5], x[6], x[40] = float("nan"), float("inf"), -float("inf"), 100.0
    if numel >= 1000:
        x[128:256] = ((torch.rand(128, generator=generator) * 2 - 1) * top).to(dtype)
        x[130], x[131], x[255] = top, -top, float("inf")
        x[256:320] = (torch.randn(64, generator=generator) * 2.0**-126).to(dtype)
        x[320:384] = (torch.randn(64, generator=generator) * tiny / 16).to(dtype)
        x[384:512] = 0.0
        x[512:640] = float("nan")
        x[640:704] = -7.25
        x[704:768] = (1000 + torch.randn(64, generator=generator)).to(dtype)
        x[768:800] = -0.0
        x[800:832], x[810] = top, -float("inf")
    return x.to(device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal type, shape and bits; NaNs of any payload are equal."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.is_floating_point():
        if not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = a.masked_fill(a.isnan(), 0.0), b.masked_fill(b.isnan(), 0.0)
        bits = torch.int16 if a.element_size() == 2 else torch.int32
        a, b = a.contiguous().view(bits), b.contiguous().view(bits)
    return torch.equal(a, b)
