"""What only a GPU can show: compiled graphs with the kernels, and tensors of more than 2^31 elements."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from ciuic_compile.codecs import Bitmask
from tests.codecs.cases import CHOSEN, awkward, codec_named, same_bits

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CHOSEN)
def test_inductor_runs_the_kernels(name: str, dynamic: bool) -> None:
    from torch._inductor.utils import run_and_get_code

    codec = codec_named(name)

    @torch.compile(dynamic=dynamic)
    def trip(x: Tensor) -> Tensor:
        return codec.decode(codec.encode(x), x.shape, x.dtype)

    for rows in (30, 64) if dynamic else (30,):
        x = awkward(rows * 100, torch.bfloat16, "cuda").view(rows, 100)
        expected = codec.decode(codec.encode(x, "reference"), x.shape, x.dtype, "reference")
        got, code = run_and_get_code(trip, x)
        assert same_bits(got, expected)
        if code:
            assert "encode" in "".join(code) and "decode" in "".join(code)


@pytest.mark.parametrize("name", CHOSEN)
def test_reference_decode_compiled_equals_the_kernel(name: str) -> None:
    codec = codec_named(name)

    @torch.compile
    def decode(encoded: tuple[Tensor, ...]) -> Tensor:
        return codec.decode(encoded, (3000,), torch.bfloat16, "reference")

    encoded = codec.encode(awkward(3000, torch.bfloat16, "cuda"))
    assert same_bits(decode(encoded), codec.decode(encoded, (3000,), torch.bfloat16, "kernel"))


@pytest.mark.parametrize("terms", [1, 5])
def test_packing_a_mask_streams(terms: int) -> None:
    """One kernel and no reduction over eight, which takes two to eight times as long; no mask is written."""
    from torch._inductor.utils import run_and_get_code

    @torch.compile
    def pack(*values: Tensor) -> Tensor:
        return Bitmask().encode(sum(values) <= 0)[0]

    values = [torch.randn(256, 640, device="cuda") for _ in range(terms)]
    packed, (code,) = run_and_get_code(pack, *values)
    assert torch.equal(packed, Bitmask().encode(sum(values) <= 0)[0])
    (kernel,) = re.findall(r"^def (triton_\w+)", code, re.MULTILINE)
    assert kernel.startswith("triton_poi_") and "torch.bool" not in code


@pytest.mark.parametrize("name", CHOSEN)
def test_more_than_two_to_the_31_elements(name: str) -> None:
    codec = codec_named(name)
    numel = 2**31 + 1000
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.empty(numel, dtype=torch.bfloat16, device="cuda")
    for part in x.split(2**28):
        part.normal_()
    encoded = codec.encode(x, "kernel")
    decoded = codec.decode(encoded, (numel,), torch.bfloat16, "kernel")
    width = 64 * 64
    for start in (0, 2**30, 2**31 - width, 2**31 - 64):
        piece = x[start : start + width]
        groups = slice(start // 64, start // 64 + -(-piece.numel() // 64))
        expected = codec.encode(piece, "reference")
        assert all(same_bits(a[groups], b) for a, b in zip(encoded, expected, strict=True)), start
        values = codec.decode(expected, piece.shape, x.dtype, "reference")
        assert same_bits(decoded[start : start + width], values), start
