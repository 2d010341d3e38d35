"""Running a planned step for real, and measuring its peak."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from . import backend, planning
from .errors import TargetError
from .types import Plan

WARM_UP = 2


@dataclass
class Peak:
    """``nbytes``: the most that was allocated at once, above what was allocated at the start."""

    nbytes: int = 0


@dataclass(frozen=True)
class Measured:
    """One step, compiled by ciuic and run.

    Attributes:
        plan: as it was made while compiling, with Inductor's own allocations where they could be replayed.
        peak_bytes: measured, above parameters, buffers and inputs; new gradients included, no optimizer.
        device: where it ran.
    """

    plan: Plan
    peak_bytes: int
    device: str


@contextlib.contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of the block: on CUDA the allocator's, on a CPU the profiler's events replayed.

    On CUDA, blocks that other work left are given back first: one that is up to a MiB too large is not split,
    and counts whole (of torch's own plans for a ResNet-50, up to 9 MiB of 4,363).
    """
    result = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        torch.cuda.synchronize(device)
        result.nbytes = torch.cuda.max_memory_allocated(device) - start
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        yield result
    assert run.profiler is not None
    assert run.profiler.kineto_results is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        result.nbytes = max(result.nbytes, live)


def run_step(
    model: nn.Module,
    example_inputs: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
    autocast: str | None = None,
    dynamic: bool | None = None,
) -> Measured:
    """Run the step that :func:`ciuic_compile.planning.plan` plans with the same arguments, and measure it.

    The model is moved to the device and gets gradients. The third step is measured; the sum of what the step
    returns stands for the loss where that is more than one number.

    Raises:
        TargetError: the step compiles to none or to several graphs, whose plans say nothing of the whole,
            or it does not fit in the device's memory.
        CiuicError: as for planning.
    """
    model = planning.unwrapped(model).to(device)
    batch = pytree.tree_map_only(Tensor, lambda t: t.to(device), example_inputs)

    def step_loss(batch: Any) -> Any:
        return planning.call(model, batch, loss_fn)

    compiled = torch.compile(
        step_loss, backend="ciuic", options={"report": "off", **(options or {})}, dynamic=dynamic
    )
    before = len(backend.plans())

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with planning.autocast_on(device, autocast):
            results = compiled(batch)
        found = [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward([t.sum() for t in found])

    try:
        for _ in range(WARM_UP):
            step()
        plans = backend.plans()[before:]
        if len(plans) != 1:
            raise TargetError(
                f"the step compiles to {len(plans)} training graphs; a peak is compared with one plan\n"
                "  fix: find the graph breaks (TORCH_LOGS=graph_breaks) and take them out"
            )
        model.zero_grad(set_to_none=True)
        gc.collect()
        with peak(device) as measured:
            step()
    except torch.OutOfMemoryError as error:
        raise TargetError(
            f"the step does not fit in the memory of {device}: {str(error).splitlines()[0]}\n"
            "  fix: give a budget, or make the batch smaller"
        ) from error
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Measured(plans[0], measured.nbytes, name)
