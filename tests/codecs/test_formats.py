"""Round trips of the reference: error bounds, special values, sizes, layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_compile.codecs._group import IntGroupCodec
from ciuic_compile.codecs._quantize import BF16_MAX, SCALE_FLOOR, largest_scale
from tests.codecs.cases import CHOSEN, DTYPES, NAMES, NUMELS, awkward, codec_named

INF = float("inf")
names, dtypes = st.sampled_from(NAMES), st.sampled_from(DTYPES)


def grouped(flat: Tensor, size: int) -> Tensor:
    """Rows of groups in float64, padded with zeros like the format."""
    padding = -flat.numel() % size
    return torch.cat([flat, flat.new_zeros(padding)]).view(-1, size).double()


def check_round_trip(codec: IntGroupCodec, x: Tensor) -> None:
    """Everything the format promises about ``x``, group by group, in float64."""
    encoded = codec.encode(x)
    y = codec.decode(encoded, x.shape, x.dtype)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    assert torch.equal(x.isnan(), y.isnan())
    infinite = x.isinf()
    assert torch.equal(infinite, y.isinf()) and torch.equal(x[infinite], y[infinite])

    before, after = grouped(x.reshape(-1), codec.group_size), grouped(y.reshape(-1), codec.group_size)
    finite = before.isfinite()
    scale = encoded[1].double()
    assert torch.equal(scale < 0, ~finite.all(1)), "the sign of a scale says whether its group is special"
    error = torch.where(finite, after - before, 0.0).abs()
    # Half a step, the rounding of the result to its type, and float32 arithmetic on the way
    # (subtracting a large offset loses 2^-24 of it).
    magnitude = torch.where(finite, before.abs(), 0.0).amax(1, keepdim=True)
    info = torch.finfo(x.dtype)
    rounding = (magnitude + scale.abs()[:, None]) * (
        info.eps / 2 + 2.0**-22
    ) + info.smallest_normal * info.eps
    assert (error <= scale.abs()[:, None] * 0.5 + rounding).all()

    # The scale is no wider than what it has to cover.
    zero = torch.zeros(())
    high = torch.where(finite, before, -INF).amax(1).clamp_min(-torch.finfo(torch.float64).max)
    low = torch.where(finite, before, INF).amin(1)
    span = torch.where(finite.any(1), high - low, zero.double())
    top = torch.where(scale < 0, codec.levels.special_top, codec.levels.top).double()
    needed = magnitude[:, 0] / top if codec.symmetric else (span + magnitude[:, 0] * 2.0**-7) / top
    assert (scale.abs() <= torch.clamp(needed * (1 + 2.0**-7) * (1 + 2.0**-22), min=SCALE_FLOOR)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_awkward_tensors(name: str, dtype: torch.dtype) -> None:
    for numel in NUMELS:
        check_round_trip(codec_named(name), awkward(numel, dtype))


@settings(max_examples=60, deadline=None)
@given(name=names, dtype=dtypes, data=st.data())
def test_any_values(name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    width = 16 if dtype == torch.float16 else 32
    values = st.floats(width=width) | st.sampled_from([0.0, -0.0, INF, -INF, float("nan"), 1.0])
    check_round_trip(codec_named(name), torch.tensor(data.draw(st.lists(values, max_size=150))).to(dtype))


@settings(max_examples=60, deadline=None)
@given(
    name=names,
    dtype=dtypes,
    numel=st.integers(1, 400),
    seed=st.integers(0, 10**6),
    exponent=st.integers(-40, 38),
    mean=st.floats(-30, 30),
)
def test_any_magnitude(
    name: str, dtype: torch.dtype, numel: int, seed: int, exponent: int, mean: float
) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) + mean
    check_round_trip(codec_named(name), (x.double() * 10.0**exponent).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_largest_values_stay_finite(name: str, dtype: torch.dtype) -> None:
    codec, top = codec_named(name), torch.finfo(dtype).max
    for values in ([top], [-top], [top, -top], [top] * codec.group_size, [top, 0.3 * top, -top, 1.0]):
        x = torch.tensor(values, dtype=torch.float64).to(dtype)
        y = codec.decode(codec.encode(x), x.shape, dtype)
        assert y.isfinite().all()
        check_round_trip(codec, x)


def test_decoding_to_float16_clamps() -> None:
    for name in NAMES:
        codec = codec_named(name)
        x = torch.tensor([1e30, -1e30, INF])
        y = codec.decode(codec.encode(x), (3,), torch.float16)
        assert y.tolist() == [65504.0, -65504.0, INF]


@pytest.mark.parametrize("name", NAMES)
def test_zeros_decode_to_exact_zeros(name: str) -> None:
    codec = codec_named(name)
    x = torch.zeros(300)
    x[codec.group_size] = 5.0  # the second group is not all zero
    y = codec.decode(codec.encode(x), (300,), torch.float32)
    assert (y[: codec.group_size] == 0).all()
    relu = torch.randn(4096, generator=torch.Generator().manual_seed(1)).relu()
    z = codec.decode(codec.encode(relu), (4096,), torch.float32)
    assert (z[relu == 0] == 0).all(), "what ReLU made zero stays zero"


@pytest.mark.parametrize("name", NAMES)
def test_one_nan_does_not_hurt_its_neighbours(name: str) -> None:
    codec = codec_named(name)
    x = 100 + torch.randn(codec.group_size, generator=torch.Generator().manual_seed(2))
    clean = codec.decode(codec.encode(x), x.shape, x.dtype)
    x[7] = float("nan")
    spoiled = codec.decode(codec.encode(x), x.shape, x.dtype)
    keep = ~x.isnan()
    worst_clean = (clean - x)[keep].abs().max()
    # At worst 6 levels for 7, 12 for 15; the offset's rounding is the same.
    assert (spoiled - x)[keep].abs().max() <= 1.5 * worst_clean + 0.5 * 100 / 126 * 0.02


@pytest.mark.parametrize("name", NAMES)
def test_values_far_below_the_floor_become_zero(name: str) -> None:
    codec = codec_named(name)
    x = torch.full((codec.group_size,), 2.0**-140)
    x[0] = -(2.0**-141)
    y = codec.decode(codec.encode(x), x.shape, x.dtype)
    assert (y.abs() <= 2.0**-126).all() and y.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_qparams_cover_their_group(name: str) -> None:
    """No finite value clips: scales round up, offsets round down (as far as bfloat16 goes)."""
    codec = codec_named(name)
    x = torch.randn(codec.group_size * 50, generator=torch.Generator().manual_seed(3)) * 1e3
    _, scale, *offset = codec.encode(x)
    rows = x.view(-1, codec.group_size).double()
    if codec.symmetric:
        assert (rows.abs().amax(1) <= scale.double() * codec.levels.top * (1 + 2.0**-23)).all()
    else:
        low = offset[0].double()
        assert (low <= rows.amin(1)).all() and (low >= -BF16_MAX).all()
        assert (rows.amax(1) <= (low + scale.double() * codec.levels.top) * (1 + 2.0**-22)).all()


@settings(max_examples=40, deadline=None)
@given(name=names, dtype=dtypes, numel=st.integers(0, 3000))
def test_encoded_bytes_are_exact(name: str, dtype: torch.dtype, numel: int) -> None:
    codec = codec_named(name)
    encoded = codec.encode(torch.zeros(numel, dtype=dtype))
    assert codec.encoded_bytes(numel, dtype.itemsize) == sum(t.numel() * t.element_size() for t in encoded)
    assert len({t.shape[0] for t in encoded}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_strides_do_not_matter(name: str) -> None:
    codec = codec_named(name)
    base = torch.randn(24, 30, 5, generator=torch.Generator().manual_seed(4))
    for x in (base.permute(2, 0, 1), base[::2, 1:], base[:, :, :1].expand(24, 30, 4), base[3, 4, 0]):
        plain = codec.encode(x.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(codec.encode(x), plain, strict=True))
        assert codec.decode(plain, x.shape, x.dtype).is_contiguous()


@pytest.mark.parametrize("name", ["int4_group32", "int5_group64", "int6_group128"])
def test_packing_is_the_documented_one(name: str) -> None:
    codec = codec_named(name)
    size, top, upper = codec.group_size, codec.levels.top, codec.bits - 4
    q = torch.randint(-top, top + 1, (size,), generator=torch.Generator().manual_seed(6))
    q[size // 3] = top  # the scale is exactly 1
    payload, scale = codec.encode(q.float())
    codes = [v + 2 ** (codec.bits - 1) for v in q.tolist()]
    half = size // 2
    expected = [codes[j] % 16 + 16 * (codes[j + half] % 16) for j in range(half)]
    width = size * upper // 8
    expected += [
        sum((codes[i] >> 4) << (i // width * upper) for i in range(j, size, width)) for j in range(width)
    ]
    assert scale.tolist() == [1.0]
    assert payload[0].tolist() == expected


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("int6_group32", [0, 63, 1]),
        ("int6_group32_affine", [62, 63, 61]),
        ("int5_group32", [0, 31, 1]),
        ("int5_group32_affine", [30, 31, 29]),
        ("int4_group32", [0, 15, 1]),
        ("int4_group32_affine", [14, 15, 13]),
    ],
)
def test_reserved_codes_are_the_documented_ones(name: str, codes: list[int]) -> None:
    codec = codec_named(name)
    payload = codec.encode(torch.tensor([float("nan"), INF, -INF]))[0][0].tolist()
    upper = codec.bits - 4
    found = [payload[j] % 16 + 16 * (payload[16 + j] % 2**upper if upper else 0) for j in range(3)]
    assert found == codes


def test_reserved_codes_of_int8_are_the_documented_ones() -> None:
    x = torch.tensor([float("nan"), INF, -INF])
    assert codec_named("int8_group32").encode(x)[0][0, :3].tolist() == [-128, 127, -127]


@settings(max_examples=30, deadline=None)
@given(name=names, numel=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_encoding_what_was_decoded_changes_little(name: str, numel: int, seed: int) -> None:
    """A second trip moves a value by less than a step (the grid may shrink by a rounding)."""
    codec = codec_named(name)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    once = codec.decode(codec.encode(x), x.shape, x.dtype)
    encoded = codec.encode(once)
    twice = codec.decode(encoded, x.shape, x.dtype)
    step = encoded[1].float().repeat_interleave(codec.group_size)[:numel]
    assert ((twice - once).abs() <= 0.5 * step + 1e-6).all()


@pytest.mark.parametrize("top", [127, 126, 31, 30, 15, 14, 7, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_scale_is_the_largest_that_stays_finite(dtype: torch.dtype, top: int) -> None:
    scale = torch.tensor(largest_scale(dtype, top))
    assert scale.to(torch.bfloat16).float() == scale
    assert (scale * top).to(dtype).isfinite()
    above = (scale.view(torch.int32) + 0x10000).view(torch.float32)  # the next bfloat16
    assert above.double() * top > torch.finfo(dtype).max


@pytest.mark.parametrize("name", CHOSEN)
def test_encode_and_decode_can_be_traced_by_dynamo(name: str) -> None:
    codec = codec_named(name)
    x = torch.randn(300)

    @torch.compile(backend="eager", fullgraph=True)
    def trip(x: Tensor) -> Tensor:
        return codec.decode(codec.encode(x), x.shape, x.dtype)

    assert torch.equal(trip(x), codec.decode(codec.encode(x), x.shape, x.dtype))
