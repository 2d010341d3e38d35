"""Peak memory of a forward and a backward graph, by walking their storages' live ranges.

Which values get a buffer, and in which order, is what Inductor is expected to decide (``schedule.py``); once
it has decided, ``replay.py`` says what it really allocates. Parameters and graph inputs are not counted,
saved tensors are, and so are the temporaries of external kernels that ``workspace.py`` knows. Left out:
rounding, and copies that Inductor makes where it runs convolutions in another layout than the graph's.

Dynamic sizes stay expressions, and are equal where they are equal at every size, as in Inductor. Bytes are
those at the example's sizes; of the same changes ``symbolize.py`` makes functions of the sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import fx

from . import compat
from .by_op import by_op
from .capture import owner, tensor
from .classify import is_reduction
from .codecs.base import Size
from .schedule import Schedule, output_nodes, written_over
from .workspace import Operand, takes_workspace, workspaces


def tensor_bytes(value: object) -> int:
    """Bytes of a fake tensor (or of every tensor in a tuple) at the sizes' hints."""
    if isinstance(value, torch.Tensor):
        return int(compat.hint(value.numel())) * value.dtype.itemsize
    if isinstance(value, (tuple, list)):
        return sum(tensor_bytes(v) for v in value)
    return 0


def exact_bytes(node: fx.Node) -> Size:
    """Bytes of a node's value, as :func:`compat.exact` gives them."""
    return _size(node.meta.get("val"), {})


#: So many storages of a size appear, or go where that is negative; what is alive is the sum so far.
Change = tuple[Size, int]


@dataclass(frozen=True)
class Peaks:
    """Bytes above parameters and inputs: saved tensors, and the peaks while each graph runs.

    Attributes:
        changes: what appears and goes in either graph, where sizes are dynamic.
        rest: names of what the backward computes at its peak and after it, in order.
        schedules: of the forward and the backward that were simulated.
    """

    saved: int
    forward: int
    backward: int
    changes: tuple[tuple[Change, ...], ...] = field(default=(), compare=False, repr=False)
    rest: tuple[str, ...] = field(default=(), compare=False, repr=False)
    schedules: tuple[Schedule, ...] = field(default=(), compare=False, repr=False)
    by_last: bool = False

    @property
    def peak(self) -> int:
        """The step's peak, in bytes."""
        return max(self.forward, self.backward)


def simulate(
    forward: fx.Graph,
    backward: fx.Graph,
    num_fwd_outputs: int,
    kind: str | None = None,
    reorder: bool = True,
) -> Peaks:
    """Predicted peaks of one training step, in bytes, parameters and graph inputs excluded.

    Args:
        kind: type of device ("cuda", "cpu") that every value counts as being on; None: what each is on.
        reorder: the backward's kernels run by their last values where that takes less; False: as Inductor
            orders them.
    """
    hints = dict[Size, int]()
    saved = saved_storages(forward, num_fwd_outputs)
    outputs = dict.fromkeys(owner(n) for n in output_nodes(forward)[:num_fwd_outputs])
    target = _Target(compat.prefers_channels_last(forward, kind), kind)
    names = {node.name for node in saved if owner(node) not in outputs}  # those are counted among the outputs
    arriving = backward.find_nodes(op="placeholder")
    live = {n: _size(n.meta.get("val"), hints) for n in arriving if n.name in names}
    beside = [n for n in outputs if n.op != "placeholder"] + [n for n in arriving if "tangents" in n.name]
    all_along = Counter(_size(n.meta.get("val"), hints) for n in beside)
    first, second = Schedule.of(forward), Schedule.of(backward)
    early = changes_by_step(first, {}, target, hints)
    late = changes_by_step(second, live, target, hints)
    tops = _tops(late, hints)
    by_last = False
    if reorder and (other := second.by_last_value()) is not second:
        changed = changes_by_step(other, live, target, hints)
        if by_last := max(lower := _tops(changed, hints)) < max(tops):
            second, late, tops = other, changed, lower
    changes = (_joined(early), (*all_along.items(), *_joined(late))) if hints else ()
    total = sum(tensor_bytes(n.meta["val"]) for n in saved)
    beneath = sum(hints.get(size, size) * count for size, count in all_along.items())
    highest = max(tops)
    rest = tuple(node.name for step in late[tops.index(highest) :] for node in step.kernel)
    peaks = (total, max(_tops(early, hints)), beneath + highest)
    return Peaks(*peaks, changes, rest, (first, second), by_last)


def _tops(steps: Iterable[Step], hints: Mapping[Size, int]) -> list[int]:
    """Most bytes alive at each step."""
    now, tops = 0, list[int]()
    for step in steps:
        alive = [*accumulate((hints.get(size, size) * n for size, n in step.changes), initial=now)]
        now = alive[-1]
        tops.append(max(alive))
    return tops


def _size(value: object, hints: dict[Size, int]) -> Size:
    """Bytes of a value as :func:`compat.exact` gives them; those of a dynamic one go into ``hints``."""
    if isinstance(value, torch.Tensor):
        size = compat.exact(value.numel()) * value.dtype.itemsize
        if not isinstance(size, int):
            hints[size] = tensor_bytes(value)
        return size
    if isinstance(value, (tuple, list)):
        return _sum((_size(v, hints) for v in value), hints)
    return 0


def _sum(sizes: Iterable[Size], hints: dict[Size, int]) -> Size:
    parts = list(sizes)
    total = compat.exact(sum(parts))
    if not isinstance(total, int):
        hints[total] = sum(hints.get(p, p) for p in parts)
    return total


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


@dataclass(frozen=True)
class Step:
    """A kernel, or none before the first, and what appears and goes there."""

    kernel: Sequence[fx.Node]
    changes: Sequence[Change]


def _joined(steps: Iterable[Step]) -> tuple[Change, ...]:
    """What appears and goes in all of them, in order."""
    return tuple(change for step in steps for change in step.changes if change[0] != 0)


def changes_by_step(
    schedule: Schedule, live_inputs: Mapping[fx.Node, Size], target: _Target, hints: dict[Size, int]
) -> list[Step]:
    """What appears and goes before the first kernel of a graph, and at each of them.

    Args:
        live_inputs: counted until their last use; other inputs never.
        hints: gets the bytes of dynamic sizes.
    """
    last_use = schedule.last_use
    dying: dict[int, dict[fx.Node, Size]] = {}  # step -> bytes of what is last used there
    for node, size in live_inputs.items():
        dying.setdefault(last_use.get(node, 0), {})[node] = size
    steps = [Step((), list(Counter(live_inputs.values()).items()))]
    for now, kernel in enumerate(schedule.kernels):
        made = _results(schedule, now, hints)
        last = dying.get(now, {})
        spare = Counter(last[storage] for storage in written_over(kernel, schedule.stored, last, dict(made)))
        new = Counter(size for _, size in made)
        inside = _temporaries(kernel[0], target, hints)
        needed = [*(new - spare).items(), (inside, 1)]
        step_changes = [*needed, *((size, -count) for size, count in needed)]
        for storage, size in made:
            dying.setdefault(last_use.get(storage, now), {})[storage] = size
        step_changes += [(size, -count) for size, count in Counter(dying.pop(now, {}).values()).items()]
        steps.append(Step(kernel, [*step_changes, *new.items()]))
    return steps


def _results(schedule: Schedule, now: int, hints: dict[Size, int]) -> list[tuple[fx.Node, Size]]:
    """The storages that a kernel makes, under the nodes that use them; what nobody uses is under the call's.

    Of a reduction Inductor does not make what nobody uses.
    """
    results: list[tuple[fx.Node, Size]] = []
    for node in schedule.buffered[now]:
        value = node.meta.get("val")
        if tensor(node) is not None:
            results.append((node, _size(value, hints)))
            continue
        parts = {n.args[1]: n for n in node.users if compat.is_getitem(n)}
        used = [n for n in parts.values() if n not in schedule.inside]
        results += [(n, _size(n.meta.get("val"), hints)) for n in used]
        if isinstance(value, (tuple, list)) and not is_reduction(node):
            results.append((node, _size([v for i, v in enumerate(value) if i not in parts], hints)))
    return results


def _temporaries(node: fx.Node, target: _Target, hints: dict[Size, int]) -> Size:
    """Bytes that a library's call takes for itself, in the layouts that Inductor will give it."""
    if not isinstance(node.target, torch._ops.OpOverload) or not _takes_workspace(node):
        return 0
    names = (a.name for a in node.target._schema.arguments)
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    values = (tensor(a) for a in arguments.values() if isinstance(a, fx.Node))
    there = (v for v in values if v is not None and (target.kind or v.device.type) == "cuda")
    operands = [_operand(v, target.channels_last) for v in there]
    result = tensor(node)
    made = None if result is None else _operand(result, target.channels_last)
    env = compat.shape_env(size for operand in operands for size in (*operand.shape, *operand.strides))
    with compat.without_guards(env) if env is not None else nullcontext():
        inside: int | torch.SymInt = sum(workspaces(str(node.target), operands, made, arguments))
    size = compat.exact(inside)
    if not isinstance(size, int):
        hints[size] = compat.hint(inside)
    return size


@by_op
def _takes_workspace(target: object) -> bool:
    return takes_workspace(str(target))


def _operand(value: torch.Tensor, channels_last: bool) -> Operand:
    shape, strides = (tuple(map(compat.comparable, sizes)) for sizes in (value.shape, value.stride()))
    operand = Operand(shape, strides, value.dtype.itemsize)
    return operand.last if channels_last and len(shape) == 4 else operand
