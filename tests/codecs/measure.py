"""Measurements that docs/numerics-codecs.md quotes; run from the top of the tree.

``python -m tests.codecs.measure error``: relative MSE on Gaussian data, measured and modelled (any machine).
``python -m tests.codecs.measure bandwidth``: kernels against a copy, over tile sizes and warps (needs a GPU).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ciuic_compile.codecs._group import IntGroupCodec
from tests.codecs.cases import NAMES, codec_named

# (bytes a program, warps)
ENCODE = ((4096, 4), (4096, 2), (8192, 4), (8192, 2), (8192, 8), (16384, 4), (16384, 8))
DECODE = ((2048, 4), (4096, 4), (2048, 2), (4096, 2), (8192, 4), (8192, 2), (16384, 4))


def error() -> None:
    """Print one row a codec: measured over 2^22 bfloat16 normals (seed 0), decoded to float32."""
    x = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in NAMES:
        codec = codec_named(name)
        y = codec.decode(codec.encode(x), x.shape, torch.float32)
        measured = ((y - x.float()).square().mean() / x.float().square().mean()).item()
        print(f"{name:22} measured {measured:.3e}  model {codec.relative_mse:.3e}")


def bandwidth() -> None:
    """Print each kernel's share of copy bandwidth, for 2^29 elements."""
    import triton

    from ciuic_compile.codecs import _triton as core

    warps = 4

    def launch(kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
        kernel[(programs,)](*args, **constexprs, num_warps=warps)

    def milliseconds(run: Callable[[], object]) -> float:
        return float(triton.testing.do_bench(run, warmup=5, rep=40, return_mode="median"))

    core.launch = launch
    core.PART_TILE = 0  # try the sizes below as they are
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1 << 29, device="cuda", dtype=dtype)
        y = torch.empty_like(x)
        copy = 2 * x.nbytes / milliseconds(lambda x=x, y=y: y.copy_(x))  # type: ignore[misc]
        print(f"{dtype}: copy {copy / 1e9:.2f} TB/s")
        for name in NAMES:
            codec: IntGroupCodec = codec_named(name)
            moved = codec.kernel_bytes(x.numel(), dtype.itemsize).encode
            row = []
            for core.ENCODE_TILE, warps in ENCODE:
                time = milliseconds(lambda c=codec, x=x: c.encode(x, "kernel"))  # type: ignore[misc]
                row.append(f"encode {core.ENCODE_TILE}/{warps} {moved / time / copy:.0%}")
            encoded = codec.encode(x, "kernel")
            for core.DECODE_TILE, warps in DECODE:
                time = milliseconds(
                    lambda c=codec, e=encoded, n=x.shape, d=dtype: c.decode(e, n, d, "kernel")  # type: ignore[misc]
                )
                row.append(f"decode {core.DECODE_TILE}/{warps} {moved / time / copy:.0%}")
            print(f"{name:22}", ", ".join(row), flush=True)


if __name__ == "__main__":
    {"error": error, "bandwidth": bandwidth}[sys.argv[1]]()
