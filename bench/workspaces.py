"""Temporaries inside external kernels: measured on this GPU, beside what the plan charges for them.

One call of each op; temporaries = the allocator's peak during the call, less what the call returns. Also what
a process takes from the device before its first tensor (the context), and cuBLAS's workspace.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import common
from bench.models import MODELS

aten = torch.ops.aten
Case = tuple[str, Callable[[], Any]]
LAYOUTS = {"plain": torch.contiguous_format, "last": torch.channels_last}
#: batch, side of the image, channels in and out, kernel, stride
RESNET = (
    (32, 56, 64, 64, 3, 1), (32, 56, 256, 64, 1, 1), (32, 28, 128, 128, 3, 1), (32, 14, 256, 256, 3, 2),
    (32, 224, 3, 64, 7, 2),
)  # fmt: skip
UNET = (
    (64, 64, 3, 64, 3, 1), (64, 64, 64, 64, 3, 1), (64, 64, 64, 64, 3, 2), (64, 32, 64, 128, 3, 1),
    (64, 32, 128, 128, 3, 1), (64, 32, 64, 128, 1, 1), (64, 16, 128, 256, 3, 1), (64, 16, 256, 256, 3, 1),
    (64, 16, 256, 768, 1, 1), (64, 16, 512, 256, 3, 1), (64, 16, 384, 256, 3, 1), (64, 32, 384, 128, 3, 1),
    (64, 32, 192, 128, 3, 1), (64, 64, 192, 64, 3, 1), (64, 64, 128, 64, 3, 1), (64, 64, 64, 3, 3, 1),
    (64, 32, 256, 256, 3, 1), (64, 64, 128, 128, 3, 1),
)  # fmt: skip


def attention(batch: int, heads: int, kv: int, seq: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """Forward and backward of the fused attentions that this GPU has."""

    def made(h: int) -> torch.Tensor:
        return torch.randn(batch, seq, h, dim, device="cuda", dtype=dtype).transpose(1, 2)

    q, k, v = made(heads), made(kv), made(kv)
    shape = f"{batch}x{heads}/{kv}x{seq}x{dim} {str(dtype).removeprefix('torch.')}"
    dy = torch.randn_like(q)
    if dtype != torch.float32:
        out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        yield f"flash {shape}", lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        yield (
            f"flash backward {shape}",
            lambda: aten._scaled_dot_product_flash_attention_backward(
                dy, q, k, v, out[0], out[1], None, None, seq, seq, 0.0, True, out[6], out[7]
            ),
        )
    if kv == heads:
        got = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)
        yield (
            f"efficient {shape}",
            lambda: aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True),
        )
        yield (
            f"efficient backward {shape}",
            lambda: aten._scaled_dot_product_efficient_attention_backward(
                dy, q, k, v, None, got[0], got[1], got[2], got[3], 0.0, [True] * 3 + [False], True
            ),
        )
    if dtype != torch.float32:
        made_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)
        yield (
            f"cudnn {shape}",
            lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True),
        )
        yield (
            f"cudnn backward {shape}",
            lambda: aten._scaled_dot_product_cudnn_attention_backward(
                dy, q, k, v, made_[0], made_[1], made_[6], made_[7], None, None, None, seq, seq, 0.0, True
            ),
        )


def convolution(
    batch: int, side: int, channels: int, out: int, kernel: int, stride: int, dtype: torch.dtype, layout: str
) -> Iterator[Case]:
    """Forward and backward of one convolution; image, weights and gradient have one ``layout``."""
    x = torch.randn(batch, channels, side, side, device="cuda", dtype=dtype).to(memory_format=LAYOUTS[layout])
    w = torch.randn(out, channels, kernel, kernel, device="cuda", dtype=dtype).to(
        memory_format=LAYOUTS[layout]
    )
    pad = [kernel // 2] * 2
    size = f"{batch}x{channels}->{out} {side}^2 k{kernel} s{stride}"
    shape = f"{size} {layout} {str(dtype).removeprefix('torch.')}"

    def forward() -> Any:
        return aten.convolution(x, w, None, [stride] * 2, pad, [1, 1], False, [0, 0], 1)

    dy = torch.randn_like(forward())
    yield f"convolution {shape}", forward

    def backward(dy: torch.Tensor) -> Any:
        mask = [channels > 3, True, False]  # images need no gradient
        return aten.convolution_backward(dy, x, w, None, [stride] * 2, pad, [1, 1], False, [0, 0], 1, mask)

    yield f"convolution_backward {shape}", lambda: backward(dy)
    if layout == "last":  # what Inductor's kernel behind a mean makes
        plain = dy.contiguous()
        yield f"convolution_backward of plain gradient {shape}", lambda: backward(plain)


def embedding(tokens: int, vocab: int, dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """torch's own embedding gradient."""
    dy = torch.randn(tokens, dim, device="cuda", dtype=dtype)
    ids = torch.randint(vocab, (tokens,), device="cuda")
    shape = f"{tokens} of {vocab}x{dim} {str(dtype).removeprefix('torch.')}"
    yield (
        f"embedding_dense_backward {shape}",
        lambda: aten.embedding_dense_backward(dy, ids, vocab, -1, False),
    )


def cases() -> Iterator[Case]:
    """Shapes of the models in bench/."""
    half, full = torch.bfloat16, torch.float32
    for heads in ((4, 32, 32, 2048, 128), (8, 16, 4, 1024, 64), (16, 12, 12, 197, 64), (2, 8, 8, 4096, 64)):
        yield from attention(*heads, half)
        yield from attention(*heads, full)
    for layout in LAYOUTS:
        for dtype in (half, full):
            for shape in RESNET:
                yield from convolution(*shape, dtype, layout)
        for shape in UNET:
            yield from convolution(*shape, half, layout)
    for tokens in (2048, 8192):
        yield from embedding(tokens, 32000, 1024, half)
        yield from embedding(tokens, 50304, 768, full)


def convolutions_of(name: str, batch: int) -> Iterator[Case]:
    """Those of a model of :mod:`bench.models` at "medium", in bfloat16, channels last."""
    built, batches, _ = MODELS[name]("medium", batch)
    inputs, _ = batches(0, torch.device("cpu"))
    shapes: dict[tuple[int, ...], None] = {}

    def seen(module: torch.nn.Module, given: tuple[torch.Tensor, ...], _: object) -> None:
        assert isinstance(module, torch.nn.Conv2d)
        _, channels, side, _ = given[0].shape
        shapes[side, channels, module.out_channels, module.kernel_size[0], module.stride[0]] = None

    for module in built.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(seen)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        built(inputs[:2])
    for side, channels, out, kernel, stride in shapes:
        yield from convolution(batch, side, channels, out, kernel, stride, torch.bfloat16, "last")


def temporaries(call: Callable[[], Any]) -> tuple[int, int]:
    """Bytes of a call's results, and its peak beyond them."""
    call()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak, held = torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated() - start
    del result
    return held, peak - held


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), help="this model's convolutions instead")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    torch.cuda.init()
    free, total = torch.cuda.mem_get_info()
    context = total - free
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    product = a @ a
    workspace = torch.cuda.memory_allocated() - before - product.nbytes
    free, total = torch.cuda.mem_get_info()
    after = total - free - torch.cuda.memory_reserved()
    print(
        f"context {context / 2**20:.0f} MiB at first, {after / 2**20:.0f} MiB after a matmul; "
        f"cuBLAS workspace {workspace / 2**20:.2f} MiB"
    )
    del a, product
    rows = []
    for name, call in convolutions_of(args.model, args.batch) if args.model else cases():
        try:
            held, extra = temporaries(call)
        except Exception as error:
            rows.append([name, "-", "-", str(error).splitlines()[0][:60]])
            continue
        rows.append([name, f"{held / 2**20:.2f}", f"{extra / 2**20:.3f}", str(extra)])
    common.table("temporaries of external kernels", ("op", "results MiB", "extra MiB", "bytes"), rows)
    if args.out:
        found = {"context": context, "context_after": after, "cublas": workspace, "rows": rows}
        common.write_json(args.out, {"environment": common.environment(common.pick_device()), **found})


if __name__ == "__main__":
    main()
