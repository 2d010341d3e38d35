"""Peak memory of a forward and a backward graph, by walking their storages' live ranges.

Which values get a buffer, and in which order, is what Inductor is expected to decide (``schedule.py``); once
it has decided, ``replay.py`` says what it really allocates. Parameters and graph inputs are not counted,
saved tensors are, and so are the temporaries of external kernels that ``workspace.py`` knows. Left out:
rounding, and copies that Inductor makes where it runs convolutions in another layout than the graph's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from . import compat
from .capture import owner, tensor
from .fusion import is_external
from .schedule import in_kernels, output_nodes, overwrites, stored_values
from .workspace import Operand, workspaces


def tensor_bytes(value: object) -> int:
    """Bytes of a fake tensor (or of every tensor in a tuple) at the sizes' hints."""
    if isinstance(value, torch.Tensor):
        return int(compat.hint(value.numel())) * value.dtype.itemsize
    if isinstance(value, (tuple, list)):
        return sum(tensor_bytes(v) for v in value)
    return 0


@dataclass(frozen=True)
class Peaks:
    """Bytes above parameters and inputs: saved tensors, and the peaks while each graph runs."""

    saved: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """The step's peak, in bytes."""
        return max(self.forward, self.backward)


def simulate(forward: fx.Graph, backward: fx.Graph, num_fwd_outputs: int, kind: str | None = None) -> Peaks:
    """Predicted peaks of one training step, in bytes, parameters and graph inputs excluded.

    Args:
        kind: type of device ("cuda", "cpu") that every value counts as being on; None: what each is on.
    """
    saved = saved_storages(forward, num_fwd_outputs)
    outputs = {owner(n) for n in output_nodes(forward)[:num_fwd_outputs]}
    user_outputs = sum(tensor_bytes(n.meta.get("val")) for n in outputs if n.op != "placeholder")
    target = _Target(compat.prefers_channels_last(forward, kind), kind)
    forward_peak = _graph_peak(forward, {}, target)
    names = {node.name for node in saved}
    live = {
        n: tensor_bytes(n.meta.get("val")) for n in backward.find_nodes(op="placeholder") if n.name in names
    }
    tangents = sum(
        tensor_bytes(n.meta.get("val")) for n in backward.find_nodes(op="placeholder") if "tangents" in n.name
    )
    backward_peak = _graph_peak(backward, live, target) + user_outputs + tangents
    return Peaks(sum(map(tensor_bytes, (n.meta["val"] for n in saved))), forward_peak, backward_peak)


def saved_storages(forward: fx.Graph, num_fwd_outputs: int) -> list[fx.Node]:
    """The nodes whose storages live from forward to backward, parameters and inputs excluded.

    A storage that several saved values share appears once, under its owner's name or, where the
    owner itself is not an output, under the first saved view of it.
    """
    seen: set[fx.Node] = set()
    result = []
    for node in output_nodes(forward)[num_fwd_outputs:]:
        base = owner(node)
        if tensor(node) is None or base.op in ("placeholder", "get_attr") or base in seen:
            continue
        seen.add(base)
        result.append(node)
    return result


@dataclass(frozen=True)
class _Target:
    """How Inductor lays out convolutions, and on what type of device; None: on what each value is."""

    channels_last: bool
    kind: str | None


def _graph_peak(graph: fx.Graph, live_inputs: Mapping[fx.Node, int], target: _Target) -> int:
    """Peak bytes of one graph.

    Args:
        live_inputs: counted until their last use; other inputs never.
    """
    returned = {owner(n) for n in output_nodes(graph)}
    stored = stored_values(graph, returned)
    kernels = in_kernels(stored)
    step = {node: i for i, kernel in enumerate(kernels) for node in kernel}
    readers: dict[fx.Node, set[int]] = {}  # storage -> steps that read it
    for node, storages in stored.items():
        for storage in storages:
            readers.setdefault(storage, set()).add(step[node])
    end = len(kernels)
    last_use = {s: end if s in returned else max(steps) for s, steps in readers.items()}
    last_use |= dict.fromkeys(returned, end)
    dying: dict[int, list[int]] = {}  # step -> sizes of what is last used there
    for node, size in live_inputs.items():
        dying.setdefault(last_use.get(node, 0), []).append(size)
    peak = live = sum(live_inputs.values())
    for now, kernel in enumerate(kernels):
        made = [
            made
            for node in kernel
            if not overwrites(node) and (node in returned or readers.get(node) != {now})  # else in registers
            for made in _results(node)
        ]
        # A kernel that is no call of a library's writes in place of what it reads for the last time.
        spare = Counter(() if is_external(kernel[0]) else dying.get(now, ()))
        new = Counter(size for _, size in made)
        inside = _temporaries(kernel[0], target)
        peak = max(peak, live + sum((new - spare).elements()) + inside)
        live += sum(new.elements())
        for storage, size in made:
            dying.setdefault(last_use.get(storage, now), []).append(size)
        live -= sum(dying.pop(now, ()))
    return peak


def _results(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The storages that a call makes, under the nodes that use them; what nobody uses is under the call's."""
    size = tensor_bytes(node.meta.get("val"))
    if tensor(node) is not None:
        return [(node, size)]
    parts = {n.args[1]: n for n in node.users if compat.is_getitem(n)}
    used = [(n, tensor_bytes(n.meta.get("val"))) for n in parts.values()]
    return [*used, (node, size - sum(part for _, part in used))]


def _temporaries(node: fx.Node, target: _Target) -> int:
    """Bytes that a library's call takes for itself, in the layouts that Inductor will give it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    names = (a.name for a in node.target._schema.arguments)
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    values = (tensor(a) for a in arguments.values() if isinstance(a, fx.Node))
    there = (v for v in values if v is not None and (target.kind or v.device.type) == "cuda")
    operands = [_operand(v, target.channels_last) for v in there]
    result = tensor(node)
    made = None if result is None else _operand(result, target.channels_last)
    return sum(workspaces(str(node.target), operands, made, arguments))


def _operand(value: torch.Tensor, channels_last: bool) -> Operand:
    shape, strides = (tuple(map(compat.hint, sizes)) for sizes in (value.shape, value.stride()))
    if channels_last and len(shape) == 4:
        _, c, h, w = shape
        strides = (c * h * w, 1, w * c, c)
    return Operand(shape, strides, value.dtype.itemsize)
