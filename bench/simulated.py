"""The peak expected before scheduling against the replay of Inductor's schedule, for a GPU that is not there.

    python -m bench.simulated --size medium --models unet --modes lossless 4:1
    python -m bench.simulated --models gpt --batch 32 --device h100 --modes lossless lossless@1870MiB

Needs a CUDA build of torch, as :mod:`bench.generated` does.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import fx

from bench import common
from bench.generated import generated, own_partition, rewritten
from bench.models import MODELS, WithLoss
from bench.peaks import GPU_SHAPES, percent
from ciuic_compile.allocator import ExactAllocator
from ciuic_compile.capture import owner
from ciuic_compile.compat_cuda import as_cuda
from ciuic_compile.confirm import joint_of
from ciuic_compile.devices import named
from ciuic_compile.passes import Graphs
from ciuic_compile.replay import StepPeaks, replay
from ciuic_compile.simulate import simulate

COLUMNS = ("cell", "simulated", "replayed", "err %", "forward", "backward")


def replayed(graphs: Graphs, by_last: bool) -> StepPeaks:
    """Peaks of the step that Inductor makes of two graphs; ``by_last``: in the order of compat_order.py."""
    joint, outputs = joint_of(graphs), graphs.forward_outputs()
    user = {owner(n) for n in outputs[: graphs.num_fwd_outputs] if isinstance(n, fx.Node)}
    saved = {name: owner(n) for name, i in joint.received.items() if isinstance(n := outputs[i], fx.Node)}
    donated = {name for name, base in saved.items() if base.op != "placeholder" and base not in user}
    forward = generated(graphs.forward)
    strides = {n: s for n, i in joint.received.items() if (s := forward.strides[i]) is not None}
    backward = generated(graphs.backward, strides, donated, by_last)
    assert forward.trace is not None and backward.trace is not None
    return replay(forward.trace, backward.trace, joint, ExactAllocator())


def cell(
    name: str, size: str, mode: str, batch: int | None = None, device: str | None = None
) -> tuple[int, StepPeaks]:
    """The simulated peak and the replayed ones of one model; mode "inductor" is torch's own partition.

    Args:
        mode: may have a budget after an "@": "lossless@2GiB".
        batch: samples; None: those of ``bench.peaks``.
        device: profile that is planned for.
    """
    mode, _, budget = mode.partition("@")
    options = {key: value for key, value in (("budget", budget), ("device", device)) if value}
    length = None
    if batch is None and size == "medium":
        batch, length = GPU_SHAPES[name][0]
    torch.manual_seed(0)
    built, batches, loss_fn = MODELS[name](size, batch, length)
    inputs, targets = batches(0, torch.device("cpu"))
    prefers_cudnn = device is not None and named(device).prefers_cudnn
    with as_cuda(prefers_cudnn), torch.autocast("cuda", torch.bfloat16):
        made = rewritten(
            WithLoss(built, loss_fn), "lossless" if mode == "inductor" else mode, inputs, targets, **options
        )
    if mode != "inductor":
        return made.plan.simulated_peak_bytes, replayed(made.graphs, made.by_last)
    own = own_partition(made.model)
    pair = own.forward.graph, own.backward.graph
    peaks = simulate(*pair, own.num_fwd_outputs, reorder=False)  # the plan's is of the CPU
    return peaks.peak, replayed(own, by_last=False)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(GPU_SHAPES))
    parser.add_argument("--modes", nargs="+", default=["inductor", "lossless", "2:1", "4:1"])
    parser.add_argument("--size", default="medium", choices=("tiny", "small", "medium", "full"))
    parser.add_argument("--batch", type=int, help="samples; default: those of bench.peaks")
    parser.add_argument("--device", help="profile that is planned for, e.g. h100")
    args = parser.parse_args()
    rows, errors = [], []
    for name in args.models:
        for mode in args.modes:
            start = time.perf_counter()
            simulated, peaks = cell(name, args.size, mode, args.batch, args.device)
            errors.append(simulated / peaks.peak - 1)
            found = map(common.mib, (peaks.forward, peaks.backward))
            rows.append(
                [f"{name} {mode}", *map(common.mib, (simulated, peaks.peak)), percent(errors[-1]), *found]
            )
            print(*rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    common.table(f"simulated against replayed peaks, MiB, size {args.size}", COLUMNS, rows)
    sizes = [abs(e) for e in errors]
    print(f"median |error| {100 * statistics.median(sizes):.2f} %, worst {100 * max(sizes):.2f} %")


if __name__ == "__main__":
    main()
