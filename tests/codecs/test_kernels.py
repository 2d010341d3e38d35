"""The Triton kernels equal the reference bit for bit.

On CPU tensors these run under TRITON_INTERPRET=1 only (test_interpreter.py starts that run, so that plain
``pytest`` covers them); with a GPU they run as compiled, against the reference on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.codecs.cases import CHOSEN, DTYPES, NAMES, NUMELS, awkward, codec_named, same_bits

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETING, reason="these are for the real compiler")],
    ),
]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_reference(name: str, dtype: torch.dtype, device: str) -> None:
    codec = codec_named(name)
    for numel in NUMELS:
        x = awkward(numel, dtype, device)
        expected = codec.encode(x, "reference")
        encoded = codec.encode(x, "kernel")
        assert all(same_bits(a, b) for a, b in zip(encoded, expected, strict=True)), numel
        for out in DTYPES:
            got = codec.decode(expected, (numel,), out, "kernel")
            assert same_bits(got, codec.decode(expected, (numel,), out, "reference")), (numel, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHOSEN)
def test_ordinary_tensors_take_the_fast_path(name: str, dtype: torch.dtype, device: str) -> None:
    """No program of these meets a special value: the other branch of every kernel."""
    codec = codec_named(name)
    for seed, scale in enumerate((1.0, 1e-30, 1e30)):
        x = torch.randn(77, 111, generator=torch.Generator().manual_seed(seed)).mul(scale).to(device, dtype)
        expected = codec.encode(x, "reference")
        assert all(same_bits(a, b) for a, b in zip(codec.encode(x, "kernel"), expected, strict=True))
        got = codec.decode(expected, x.shape, dtype, "kernel")
        assert same_bits(got, codec.decode(expected, x.shape, dtype, "reference"))


def test_ties_round_to_even(device: str) -> None:
    for name, bound in (
        ("int8_group32", 127),
        ("int6_group32", 31),
        ("int5_group32", 15),
        ("int4_group32", 7),
    ):
        codec = codec_named(name)
        x = torch.arange(32, device=device).sub(16).remainder(2 * bound - 1).sub(bound - 1) + 0.5
        x[0] = float(bound)  # the scale is exactly 1
        y = codec.decode(codec.encode(x, "kernel"), (32,), torch.float32, "kernel")
        assert y.tolist() == [round(v) for v in x.tolist()]


CANARY = 512


class Poisoned:
    """Stands in for torch.empty: fills with one byte, and keeps canaries after every tensor."""

    def __init__(self, byte: int, real: Callable[..., Tensor]) -> None:
        self.byte, self.real = byte, real
        self.buffers: list[tuple[Tensor, int]] = []

    def __call__(self, size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = 1
        for n in size:
            numel *= n
        buffer = self.real((numel * dtype.itemsize + CANARY,), dtype=torch.uint8, device=device).fill_(
            self.byte
        )
        self.buffers.append((buffer, numel * dtype.itemsize))
        return buffer[:-CANARY].view(dtype).view(size)

    def intact(self) -> bool:
        """Nothing was written behind any tensor."""
        return all(bool((buffer[end:] == self.byte).all()) for buffer, end in self.buffers)


@pytest.mark.parametrize(
    "name", ["int8_group64", "int6_group64", "int5_group32_affine", "int4_group64", "int4_group32_affine"]
)
def test_every_byte_is_written_and_none_beyond(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, real = codec_named(name), torch.empty
    for numel in (1, 64, 100, 5000):
        x = awkward(numel, torch.bfloat16, device)
        runs = []
        for byte in (0x00, 0xA5, 0xFF):
            poisoned = Poisoned(byte, real)
            monkeypatch.setattr(torch, "empty", poisoned)
            encoded = codec.encode(x, "kernel")
            decoded = codec.decode(encoded, (numel,), torch.bfloat16, "kernel")
            monkeypatch.undo()
            assert len(poisoned.buffers) == len(encoded) + 1, "every output must come from torch.empty"
            assert poisoned.intact()
            runs.append((*encoded, decoded))
        for run in runs[1:]:
            assert all(same_bits(a, b) for a, b in zip(run, runs[0], strict=True))
