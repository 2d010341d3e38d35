"""Formulas of external kernels' temporaries against those that an H200 measured (bench/workspaces.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format

from bench.peaks import empty_kernels
from ciuic_compile import compat_wrapper
from ciuic_compile.workspace import Operand, blas_libraries, workspaces
from tests.training import Lambda

MIB = 2**20

MEASURED = Path(__file__).resolve().parent.parent / "bench" / "results" / "workspaces-h200.json"
ROWS = {row[0]: int(row[3]) for row in json.loads(MEASURED.read_text())["rows"] if row[3].isdigit()}
SIZES = {"bfloat16": 2, "float32": 4}
#: batch, channels, outputs, side of the image, kernel, stride: MiB beside the results of forward and
#: backward, with plain contiguous operands and then with channels-last ones. Measured by hand
#: on an H200 (torch 2.11, bfloat16) before bench/workspaces.py had these shapes.
CONVOLUTIONS = {
    (64, 3, 64, 64, 3, 1): (0.00, 36.13, 4.01, 4.13),
    (64, 64, 64, 64, 3, 1): (64.07, 65.90, 0.00, 1.83),
    (64, 64, 64, 64, 3, 2): (40.07, 41.79, 0.00, 1.72),
    (64, 64, 128, 32, 3, 1): (24.14, 27.80, 0.00, 4.00),
    (64, 128, 128, 32, 3, 1): (32.28, 35.66, 0.00, 4.00),
    (64, 64, 128, 32, 1, 1): (0.00, 2.00, 0.00, 1.50),
    (64, 128, 256, 16, 3, 1): (12.56, 23.81, 0.00, 12.00),
    (64, 256, 256, 16, 3, 1): (17.13, 21.63, 0.00, 4.50),
    (64, 256, 768, 16, 1, 1): (0.00, 33.50, 0.00, 6.00),
    (64, 512, 256, 16, 3, 1): (26.25, 29.25, 0.00, 3.00),
    (64, 384, 256, 16, 3, 1): (21.69, 21.69, 0.00, 0.00),
    (64, 384, 128, 32, 3, 1): (68.84, 64.84, 4.00, 0.00),
    (64, 192, 128, 32, 3, 1): (40.42, 43.24, 0.00, 2.81),
    (64, 192, 64, 64, 3, 1): (128.21, 132.00, 0.00, 2.81),
    (64, 128, 64, 64, 3, 1): (96.14, 99.80, 0.00, 3.66),
    (64, 64, 3, 64, 3, 1): (36.01, 37.73, 4.01, 5.73),
    (64, 256, 256, 32, 3, 1): (65.13, 80.88, 0.00, 15.75),
    (64, 128, 128, 64, 3, 1): (128.28, 136.00, 0.00, 7.31),
}
#: What cuDNN took at most beside copies, in MiB: partial sums, another choice for every shape.
PARTIAL_SUMS = 16
ONE = {"groups": 1, "transposed": False}
LAYOUTS = {"plain": torch.contiguous_format, "last": torch.channels_last}


def operand(*shape: int, itemsize: int = 2, layout: str = "plain") -> Operand:
    """A dense tensor; images and weights may have their channels last."""
    strides = torch.empty(shape, device="meta").to(memory_format=LAYOUTS[layout]).stride()
    return Operand(tuple(shape), tuple(strides), itemsize)


def total(
    op: str,
    operands: list[Operand],
    result: Operand | None = None,
    arguments: dict[str, object] | None = None,
) -> int:
    """Bytes of all of a call's temporaries."""
    return sum(workspaces(op, operands, result, arguments))


@pytest.mark.parametrize("name", [n for n in ROWS if "backward" in n and "x" in n and "convol" not in n])
def test_formulas(name: str) -> None:
    kind, shape, dtype = re.fullmatch(r"(\w+(?: backward)?) (.*) (\w+)", name).groups()  # type: ignore[union-attr]
    size = SIZES[dtype]
    if kind == "embedding_dense_backward":
        tokens, _, width = map(int, re.findall(r"\d+", shape))
        operands = [operand(tokens, width, itemsize=size), operand(tokens, itemsize=8)]
        expected = total(f"aten.{kind}.default", operands)
    else:
        batch, heads, kv, rows, width = map(int, re.findall(r"\d+", shape))
        op = f"aten._scaled_dot_product_{kind.split()[0]}_attention_backward.default"
        q, k = (operand(batch, h, rows, width, itemsize=size) for h in (heads, kv))
        expected = total(op, [q, q, k, k])
    assert expected == pytest.approx(ROWS[name], rel=0.02)


def convolved(
    batch: int, channels: int, out: int, side: int, kernel: int, stride: int, layout: str = "plain"
) -> tuple[int, int]:
    """Temporaries of a convolution's forward and backward; ``side`` is the image's."""
    image = operand(batch, channels, side, side, layout=layout)
    weight = operand(out, channels, kernel, kernel, layout=layout)
    features = operand(batch, out, side // stride, side // stride, layout=layout)
    return (
        total("aten.convolution.default", [image, weight], features, ONE),
        total("aten.convolution_backward.default", [features, image, weight], None, ONE),
    )


@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions(shape: tuple[int, ...], layout: str) -> None:
    """Of 3x3 kernels every copy is known, so that what is left are partial sums."""
    measured = CONVOLUTIONS[shape][:2] if layout == "plain" else CONVOLUTIONS[shape][2:]
    forward, backward = (n / MIB for n in convolved(*shape, layout=layout))  # type: ignore[arg-type]
    if shape[4] == 1:
        assert forward == backward == 0
        return
    rounding = 0.011
    assert -rounding <= measured[0] - forward <= 4 + rounding
    assert -rounding <= measured[1] - backward <= PARTIAL_SUMS
    assert layout == "plain" or forward == backward == 0 or 3 in shape[1:3]


def test_an_image_of_three_planes_is_padded_to_eight() -> None:
    """The first layer of a ResNet, as bench/workspaces.py measured it."""
    forward, _ = convolved(32, 3, 64, 224, 7, 2, "last")
    assert forward == pytest.approx(ROWS["convolution 32x3->64 224^2 k7 s2 bfloat16"], abs=512)


@pytest.mark.parametrize(("batch", "side"), [(64, 224), (32, 160)])
def test_an_image_cut_in_patches_is_copied(batch: int, side: int) -> None:
    """A ViT's first layer, as bench/reserved.py saw it on an H200; the backward also took 18 MiB of sums."""
    image, weight = operand(batch, 3, side, side), operand(768, 3, 16, 16)
    features = operand(batch, 768, side // 16, side // 16)
    call = {**ONE, "stride": [16, 16]}
    measured = {(64, 224): (70.375, 18.375), (32, 160): (20.1875, 4.6875)}[batch, side]
    forward = workspaces("aten.convolution.default", [image, weight], features, call)
    assert forward == (measured[0] * MIB,)
    gradient = operand(*features.shape, layout="last")  # plain as its image: copied by torch, then by cuDNN
    backward = workspaces("aten.convolution_backward.default", [gradient, image, weight], None, call)
    assert backward == (measured[1] * MIB, measured[0] * MIB)
    overlapping = {**ONE, "stride": [8, 8]}
    assert workspaces("aten.convolution.default", [image, weight], features, overlapping) == ()


def test_a_gradient_with_gaps_is_copied_first() -> None:
    """Half of the channels that a UNet concatenated: seen on an H200 as 32 and 64.07 MiB."""
    image, weight = operand(64, 64, 64, 64), operand(64, 64, 3, 3)
    gradient = Operand((64, 64, 64, 64), (2 * 64**3, 64**2, 64, 1), 2)
    blocks = workspaces("aten.convolution_backward.default", [gradient, image, weight], None, ONE)
    assert blocks == (32 * MIB, total("aten.convolution_backward.default", [image, image, weight], None, ONE))
    pointwise = operand(64, 64, 1, 1)  # in doubt whether its channels come last: plain, so torch copies
    assert total("aten.convolution_backward.default", [gradient, image, pointwise], None, ONE) == 32 * MIB


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_plain_gradient_of_a_channels_last_image_is_copied_first(kernel: int) -> None:
    """A ResNet's last block, behind the mean: bench/history.py saw 49 MiB at its peak on an H100."""
    image, weight = (operand(*n, layout="last") for n in ((256, 1024, 14, 14), (2048, 1024, kernel, kernel)))
    gradient = operand(256, 2048, 7, 7)
    blocks = workspaces("aten.convolution_backward.default", [gradient, image, weight], None, ONE)
    assert blocks == (49 * MIB,)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 1, 1), (2, 1, 4, 4), (1, 8, 4, 4), (1, 1, 1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_read_as_torch_reads_them(shape: tuple[int, ...], layout: str) -> None:
    tensor = torch.empty(shape).to(memory_format=LAYOUTS[layout])
    for t in (tensor, tensor[:, :1], tensor[..., :1]):
        seen = Operand(tuple(t.shape), t.stride(), 4)
        assert seen.suggests_channels_last == (suggest_memory_format(t) == torch.channels_last)
        assert seen.is_plain == t.is_contiguous()
        assert seen.plain.strides == t.contiguous().new_empty(t.shape).stride()


def test_libraries_that_a_matmul_calls() -> None:
    """cuBLASLt adds a bias of one row; an H200 (torch 2.11) made 32 MiB and then 1 MiB there."""
    row, matrix, square = operand(8), operand(8, 8), operand(8, 8)
    assert blas_libraries("addmm", [row, square, square]) == ("cublas", "cublaslt")
    assert blas_libraries("addmm", [Operand((8, 8), (0, 1), 2), square, square]) == ("cublas", "cublaslt")
    assert blas_libraries("addmm", [matrix, square, square]) == ("cublas",)
    assert blas_libraries("mm", [row, square]) == blas_libraries("bmm", [square, square]) == ("cublas",)
    assert blas_libraries("convolution", [square, square]) == ()


def test_only_what_lies_otherwise_is_copied() -> None:
    """torch takes channels last for all when the image or the weights have it, and copies the others."""
    image, features = operand(2, 16, 8, 8, layout="last"), operand(2, 32, 8, 8)
    weight = operand(32, 16, 3, 3)
    call = [features, image, weight]
    assert total("aten.convolution_backward.default", call, None, ONE) == 2 * (2 * 32 * 64 + 32 * 144)


@pytest.mark.parametrize(
    "change", [{"groups": 2}, {"transposed": True}, {"groups": None}, "float32", "5 dimensions"]
)
def test_other_convolutions_are_not_known(change: object) -> None:
    size = 4 if change == "float32" else 2
    more = (8,) if change == "5 dimensions" else ()
    image, weight = operand(2, 16, 8, 8, *more, itemsize=size), operand(32, 16, 3, 3, *more, itemsize=size)
    features = operand(2, 32, 8, 8, *more, itemsize=size)
    arguments = {**ONE, **change} if isinstance(change, dict) else ONE
    assert total("aten.convolution.default", [image, weight], features, arguments) == 0
    assert total("aten.convolution_backward.default", [features, image, weight], None, arguments) == 0


def test_channels_last() -> None:
    assert operand(2, 3, 4, 5, layout="last").channels_last
    assert not operand(2, 3, 4, 5).channels_last
    assert operand(2, 1, 4, 5).channels_last, "of one plane there is no other layout"
    assert not Operand((2, 3, 4, 4), (64, 1, 16, 4), 2).channels_last, "one plane of four left out"
    assert not operand(6, 4).channels_last


def test_what_inductor_says_about_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Op, layouts and arguments, as read from Inductor's own nodes of a forward and a backward."""
    seen: list[tuple[str, list[Operand], Operand | None, dict[str, object]]] = []

    def record(node: object) -> tuple[int, ...]:
        seen.append(compat_wrapper._call(node))
        return ()

    monkeypatch.setattr(compat_wrapper, "_workspace", record)

    def forward(m: nn.ModuleList, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, w, stride=2), w[:, :2] + 1, groups=2).sum()

    x, w = torch.randn(2, 4, 17, 17), torch.randn(4, 4, 3, 3, requires_grad=True)
    with empty_kernels():
        torch.compile(Lambda(forward), backend="ciuic", options={"report": "off"})(x, w)
    forwards = [call for call in seen if call[0] == "aten.convolution.default"]
    backwards = [call for call in seen if call[0] == "aten.convolution_backward.default"]
    assert len(forwards) + len(backwards) == len(seen) == 4
    for calls, groups in ((forwards, [1, 2]), (backwards, [2, 1])):
        assert [call[3]["groups"] for call in calls] == groups
        assert not any(call[3]["transposed"] for call in calls)
        assert [list(call[3]["stride"]) for call in calls] == (
            [[2, 2], [1, 1]][:: 1 if groups == [1, 2] else -1]
        )  # type: ignore[call-overload]
    for _, (image, weight), features, _ in forwards:  # Inductor's layout for convolutions on a CPU
        assert image.channels_last and weight.channels_last
        assert features is not None and features.channels_last and features.shape[1] == weight.shape[0] == 4
    (_, (gradient, image, _), _, _), (_, (_, received, weight), result, _) = backwards
    assert (gradient.shape, image.shape, image.channels_last) == ((2, 4, 6, 6), (2, 4, 8, 8), True)
    assert received.channels_last and weight.strides == w.stride(), "the weight as the caller gave it"
    assert result is None


def test_what_is_not_known_is_nothing() -> None:
    assert total("aten.mm.default", [operand(4, 4), operand(4, 4)], operand(4, 4)) == 0
    assert total("", []) == 0
