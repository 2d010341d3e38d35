"""What a training step keeps, peaks at, and gets wrong: measured, never planned.

Bytes are those of untyped storages. Saved means: reachable from the loss through autograd, and neither a
parameter, nor a buffer, nor an input.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from ciuic_compile.verifying import Peak as Peak
from ciuic_compile.verifying import peak as peak

MIB = 2**20


@dataclass(frozen=True)
class Saved:
    """What lives from forward to backward: ``nbytes`` in ``count`` storages."""

    nbytes: int
    count: int


def saved(loss: Tensor, exclude: Iterable[Tensor]) -> Saved:
    """Return the storages that ``loss`` keeps alive for its backward, those of ``exclude`` left out.

    Call it between forward and backward. Saved tensors of eager nodes and of compiled ones count alike.
    """
    sizes: dict[int, int] = {}
    for tensor in _saved_tensors(loss):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    for tensor in exclude:
        for part in _parts(tensor):
            sizes.pop(part.untyped_storage()._cdata, None)
    return Saved(sum(sizes.values()), len(sizes))


def model_tensors(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Return what never counts as saved: parameters, buffers and inputs."""
    return [*model.parameters(), *model.buffers(), *inputs]


def _saved_tensors(loss: Tensor) -> Iterator[Tensor]:
    """Everything that the nodes behind ``loss`` hold."""
    seen: set[Node] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        if hasattr(node, "saved_tensors"):
            # a compiled graph: torch 2.13 keeps some tensors on the context, beside the saved ones
            yield from _flatten([node.saved_tensors, vars(node)])
        else:
            names = [n for n in dir(node) if n.startswith("_saved_") or n == "variable"]
            yield from _flatten([getattr(node, name) for name in names])


def _flatten(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _flatten(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _flatten(item)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of a tensor subclass; the tensor itself otherwise."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten(tensor)[0] for part in _parts(getattr(tensor, name))]


@dataclass(frozen=True)
class GradientError:
    """``||g' - g|| / ||g||`` of the whole gradient and of the worst single parameter.

    Parameters whose gradient is (nearly) zero in exact arithmetic, e.g. the bias of a key projection, have
    no meaningful relative error: those with a norm under 1e-4 of the parameters' root mean square are
    ``tiny`` and reported apart, their worst error relative to that root mean square.
    """

    whole: float
    worst: float
    worst_name: str
    tiny: tuple[str, ...]
    tiny_worst: float


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients by parameter name."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def gradient_error(reference: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> GradientError:
    """Compare gradients by parameter name, in float64.

    Raises:
        ValueError: the names differ, or there are none.
    """
    if set(reference) != set(got) or not reference:
        raise ValueError(
            f"gradients of different parameters: {sorted(set(reference) ^ set(got)) or 'none at all'}"
        )
    norm = {n: _norm(g) for n, g in reference.items()}
    wrong = {n: _norm(got[n].double() - g.to(got[n].device).double()) for n, g in reference.items()}
    total = math.hypot(*norm.values())
    rms = total / math.sqrt(len(norm))
    tiny = tuple(n for n in norm if norm[n] < 1e-4 * rms)
    relative = {n: wrong[n] / norm[n] for n in norm if n not in tiny}
    # a NaN must win: max() would drop it
    worst = max(relative, key=lambda n: math.inf if math.isnan(relative[n]) else relative[n], default="")
    return GradientError(
        whole=math.hypot(*wrong.values()) / total if total else math.nan,
        worst=relative.get(worst, math.nan),
        worst_name=worst,
        tiny=tiny,
        tiny_worst=max((wrong[n] / rms for n in tiny), default=0.0),
    )


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()))


def time_steps(step: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Return the milliseconds of each of ``count`` runs (CUDA events on a GPU)."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    return [float(a.elapsed_time(b)) for a, b in itertools.pairwise(events)]
