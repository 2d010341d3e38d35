"""Ways to pack a mask into bits, as Inductor compiles them: microseconds of each one's kernels.

    python -m bench.masks --out bench/results/masks-h200.json

Beside ``codecs/bitmask`` (eight reads or'ed) the sum over eight that it was until 61dff6f. The masks are
those of a ReLU's output with its channels last, as its backward reads it, and booleans in memory.
Needs a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.kernel_times import profiled
from ciuic_compile.codecs import Bitmask

IMAGES = ((256, 64, 112, 112), (256, 256, 56, 56), (256, 2048, 7, 7))
BOOLEANS = 2**27
STEPS = 20


def ored(mask: Tensor) -> Tensor:
    """The codec."""
    return Bitmask().encode(mask)[0]


def summed(mask: Tensor) -> Tensor:
    """A reduction; the mask has a multiple of eight elements."""
    shifts = torch.arange(8, device=mask.device, dtype=torch.uint8)[:, None]
    return (mask.reshape(8, -1).to(torch.uint8) << shifts).sum(0, dtype=torch.uint8)


def of_image(pack: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A ReLU, and its packed mask in the order of its memory."""

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(x * weight)
        return y, pack((y <= 0).permute(0, 2, 3, 1))

    return run


def measured(case: str, way: str, run: Callable[..., Any], *inputs: Tensor) -> dict[str, Any]:
    """Microseconds of each kernel of the compiled function."""
    torch._dynamo.reset()
    step = torch.compile(run, dynamic=False)
    for _ in range(3):
        step(*inputs)
    kernels = profiled(lambda: step(*inputs), STEPS)
    return {"case": case, "way": way, "us": {name: 1e3 * ms for name, (ms, _) in kernels.items()}}


def main() -> None:
    """Print the kernels and write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    device = torch.device("cuda")
    rows = []
    for way in (summed, ored):
        for shape in IMAGES:
            for dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
                weight = torch.randn(1, shape[1], 1, 1, device=device)
                rows.append(measured(f"{list(shape)} {dtype}", way.__name__, of_image(way), x, weight))
        booleans = torch.rand(BOOLEANS, device=device) > 0.1
        rows.append(measured(f"{BOOLEANS} booleans", way.__name__, way, booleans))
    lines = [[r["case"], r["way"], f"{us:.0f}", name] for r in rows for name, us in r["us"].items()]
    common.table("packing masks", ("mask", "way", "us", "kernel"), lines)
    common.write_json(args.out, {"environment": common.environment(device), "rows": rows})


if __name__ == "__main__":
    main()
