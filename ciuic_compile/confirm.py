"""Stage 8: hold the plan against what Inductor scheduled, before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import fx

from . import compat
from .allocator import Allocator, CachingAllocator, ExactAllocator
from .capture import tensor
from .compat_wrapper import Recording
from .devices import DeviceProfile, profile_for
from .passes import Graphs
from .replay import Joint, StepPeaks, Trace, replay
from .simulate import exact_bytes, tensor_bytes
from .symbolize import narrowed, replayed
from .types import Plan


def joint_of(graphs: Graphs) -> Joint:
    """How the rewritten graphs hand tensors from one to the other (``verify`` has checked the order)."""
    outputs = graphs.forward_outputs()
    sent = [
        i
        for i, n in enumerate(outputs)
        if i >= graphs.num_fwd_outputs and isinstance(n, fx.Node) and tensor(n) is not None
    ]
    arriving = [n for n in graphs.backward.graph.find_nodes(op="placeholder") if tensor(n) is not None]
    return Joint(
        outputs=len(outputs),
        num_fwd_outputs=graphs.num_fwd_outputs,
        received={n.name: i for n, i in zip(arriving, sent, strict=False)},
        tangents={n.name: tensor_bytes(n.meta["val"]) for n in arriving[len(sent) :]},
        sizes={n.name: exact_bytes(n) for n in arriving[len(sent) :]},
        holds_tangents=not compat.frees_tangents(),
    )


def confirm(plan: Plan, recording: Recording, joint: Joint, inputs: Sequence[object]) -> Plan:
    """The plan with the peaks of Inductor's own allocations; with a note where they are not known."""
    there = main_device(inputs)
    device = plan.profile or profile_for(there)
    sizes = storage_sizes(inputs)
    plan = narrowed(in_memory(replace(plan, input_bytes=sum(sizes)), device), inputs)
    if device.caches != (there.type != "cpu"):
        why = f"its code is for a {there.type}, the plan for {device.name}"
        return replace(plan, notes=(*plan.notes, f"the peak is simulated, not replayed: {why}"))
    forward, backward = recording.forward, recording.backward
    if forward is None or backward is None:
        why = next(iter(recording.problems), "Inductor took the code from a cache")
        return replace(plan, notes=(*plan.notes, f"the peak is simulated, not replayed: {why}"))
    if len(forward.outputs) != joint.outputs or not set(joint.received) <= set(backward.inputs):
        why = "Inductor changed what the graphs return"
        return replace(plan, notes=(*plan.notes, f"the peak is simulated, not replayed: {why}"))
    peaks = _replay(forward, backward, joint, device, sizes)
    plan = replace(
        plan,
        planned_peak_bytes=peaks.peak,
        replayed=True,
        gradient_bytes=backward.output_bytes,
        reserved_bytes=peaks.reserved,
        blas_bytes=peaks.lasting,
        process_bytes=None if device.context_bytes is None else peaks.reserved + device.context_bytes,
    )
    return replayed(plan, inputs, forward, backward, joint, device.caches)


def main_device(values: Iterable[object]) -> torch.device:
    """The first accelerator that one of the tensors is on, else the CPU."""
    devices = [v.device for v in values if isinstance(v, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def in_memory(plan: Plan, device: DeviceProfile) -> Plan:
    """The plan, with a note where the device has too little memory for it."""
    needed = plan.input_bytes + plan.planned_peak_bytes
    if device.memory_bytes is None or needed <= device.memory_bytes:
        return plan
    note = (
        f"{device.name} has {device.memory_bytes / 2**30:.1f} GiB, and parameters, inputs and the planned "
        f"peak take {needed / 2**30:.1f}: give a budget, or make the batch smaller"
    )
    return replace(plan, notes=(*plan.notes, note))


def _replay(
    forward: Trace, backward: Trace, joint: Joint, device: DeviceProfile, resident: Sequence[int]
) -> StepPeaks:
    allocator: Allocator = CachingAllocator(device.granularity) if device.caches else ExactAllocator()
    for size in resident:
        allocator.alloc(size)
    return replay(forward, backward, joint, allocator, workspaces=device.workspaces)


def storage_sizes(inputs: Sequence[object]) -> list[int]:
    """Bytes of the distinct storages behind a graph's inputs, in order."""
    sizes: dict[int, int] = {}
    for value in inputs:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            sizes.setdefault(storage._cdata, compat.hint(storage.nbytes()))
    return list(sizes.values())
