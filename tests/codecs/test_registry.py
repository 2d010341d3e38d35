"""Names, refusals, sizes as expressions, and the error model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sympy
import torch

from ciuic_compile.analyze import LOSSY_CODECS
from ciuic_compile.codecs import CODECS, get_codec
from ciuic_compile.errors import OptionError
from tests.codecs.cases import CHOSEN, NAMES, codec_named


def test_names_are_canonical() -> None:
    for name in NAMES:
        assert get_codec(name).name == name
        assert get_codec(name) == get_codec(name) and hash(get_codec(name)) == hash(get_codec(name))
    assert set(CHOSEN) < {codec.name for codec in CODECS}
    bits = [codec.bits for codec in CODECS]
    assert bits == sorted(bits, reverse=True), "most precise first"
    assert [name.format(64) for name in LOSSY_CODECS] == list(CHOSEN), "what the planner offers is tested"


@pytest.mark.parametrize(
    "name", ["int4_group64_afine", "int8_group64_affine", "int4_group48", "int4_group064", "fp8", ""]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="unknown codec"):
        get_codec(name)


def test_refusal_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'int4_group64_affine'"):
        get_codec("int4_group64_afine")


def test_what_cannot_run_is_refused() -> None:
    codec = codec_named("int8_group64")
    for dtype in (torch.float64, torch.int32, torch.bool):
        with pytest.raises(OptionError, match="int8_group64 takes"):
            codec.encode(torch.zeros(3, dtype=dtype))
    encoded = codec.encode(torch.zeros(3))
    with pytest.raises(OptionError, match="takes"):
        codec.decode(encoded, (3,), torch.float64)
    with pytest.raises(OptionError, match="reference"):
        codec.encode(torch.zeros(3), "kernel")
    with pytest.raises(OptionError, match="none of"):
        codec.encode(torch.zeros(3), "triton")  # type: ignore[arg-type]


def test_sizes_as_expressions() -> None:
    n = sympy.Symbol("n", integer=True, positive=True)
    for name in NAMES:
        codec = codec_named(name)
        size, moved = codec.encoded_bytes(n, 2), codec.kernel_bytes(n, 2)
        for value in (1, 63, 64, 65, 4096, 2**33 + 1):
            assert size.subs(n, value) == codec.encoded_bytes(value, 2)
            assert moved.encode.subs(n, value) == value * 2 + codec.encoded_bytes(value, 2)
            assert moved.decode.subs(n, value) == codec.kernel_bytes(value, 2).decode
    assert codec_named("int4_group64").encoded_bytes(64, 2) * 8 == 64 * 4.25
    assert codec_named("int4_group64_affine").encoded_bytes(64, 2) * 8 == 64 * 4.5
    assert codec_named("int5_group64").encoded_bytes(64, 2) * 8 == 64 * 5.25
    assert codec_named("int6_group64").encoded_bytes(64, 2) * 8 == 64 * 6.25
    assert codec_named("int8_group64").encoded_bytes(64, 2) * 8 == 64 * 8.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_error_model_on_gaussian_data(name: str, dtype: torch.dtype) -> None:
    codec = codec_named(name)
    x = torch.randn(1 << 19, generator=torch.Generator().manual_seed(5)).to(dtype)
    y = codec.decode(codec.encode(x), x.shape, torch.float32)
    measured = ((y - x.float()).square().mean() / x.float().square().mean()).item()
    assert codec.relative_mse == pytest.approx(measured, rel=0.05)


def test_error_grows_with_group_size_and_shrinks_with_bits() -> None:
    def mse(name: str) -> float:
        return get_codec(name).relative_mse

    assert mse("int4_group32") < mse("int4_group64") < mse("int4_group128")
    assert mse("int8_group64") < mse("int6_group64") < mse("int5_group64") < mse("int4_group64_affine")
    assert mse("int4_group64_affine") < mse("int4_group64")


def test_importing_needs_no_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from ciuic_compile.codecs import get_codec\n"
        "codec = get_codec('int4_group64'); x = torch.ones(5)\n"
        "assert torch.equal(codec.decode(codec.encode(x), (5,), x.dtype).round(), x)\n"
        "try: codec.encode(x, 'kernel')\n"
        "except Exception as error: assert 'not installed' in str(error), error\n"
        "else: raise SystemExit('kernel ran')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
