"""What Inductor will really allocate: its generated code's own allocations and frees, replayed.

The plan's first peak comes from ``simulate.py``, before Inductor has scheduled anything. Once code exists,
the wrapper's lines say which buffer is allocated, reused and freed when (``compat_wrapper.py`` reads them);
played through the device's allocator, forward and then backward, they give the peak of the step. Left out:
temporaries of external kernels that ``workspace.py`` does not know, the optimizer, gradients that accumulate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .allocator import Allocator


@dataclass(frozen=True)
class Event:
    """One storage appears (``nbytes`` > 0), or goes (``nbytes`` == -1).

    ``transient`` bytes are taken and given back at once: an external kernel's own temporaries.
    """

    storage: str
    nbytes: int
    transient: bool = False


FREE = -1


@dataclass(frozen=True)
class Trace:
    """The allocations of one compiled graph, in order.

    Attributes:
        inputs: names of the graph's inputs, in order; they are storages too.
        outputs: storage behind each output, in order; None for numbers.
        events: allocations and frees; inputs are only ever freed.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str | None, ...]
    events: tuple[Event, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of the storages that the graph makes and returns."""
        returned = set(self.outputs)
        return sum(e.nbytes for e in self.events if e.nbytes != FREE and e.storage in returned)


@dataclass(frozen=True)
class Joint:
    """How a forward and a backward graph belong together.

    Attributes:
        outputs: number of the forward's outputs.
        num_fwd_outputs: how many of them the user gets; they live until the backward is over.
        received: backward input -> index of the forward output that it is.
        tangents: backward inputs that the autograd engine makes, with their bytes.
    """

    outputs: int
    num_fwd_outputs: int
    received: Mapping[str, int]
    tangents: Mapping[str, int]


@dataclass(frozen=True)
class StepPeaks:
    """Bytes above parameters and inputs: in use at most in either graph, and taken from the device."""

    forward: int
    backward: int
    reserved: int

    @property
    def peak(self) -> int:
        """The step's allocated peak, in bytes."""
        return max(self.forward, self.backward)


def replay(forward: Trace, backward: Trace, joint: Joint, allocator: Allocator, steps: int = 2) -> StepPeaks:
    """Play training steps through an allocator; the peaks are those of the last one.

    Args:
        steps: the first fills the allocator's cache, as a warm-up does.
    """
    peaks = StepPeaks(0, 0, 0)
    for _ in range(steps):
        peaks = _step(forward, backward, joint, allocator)
    return peaks


def _step(forward: Trace, backward: Trace, joint: Joint, allocator: Allocator) -> StepPeaks:
    start = allocator.allocated
    live: dict[str, int] = {}
    allocator.peak_allocated = start
    _play(forward.events, live, allocator)
    forward_peak = allocator.peak_allocated - start
    kept = {s for s in forward.outputs if s is not None}
    for storage in [s for s in live if s not in kept]:
        allocator.free(live.pop(storage))
    allocator.peak_allocated = allocator.allocated
    user = {s for s in forward.outputs[: joint.num_fwd_outputs] if s is not None}
    sent = {name: forward.outputs[index] for name, index in joint.received.items()}
    holders = Counter(s for s in sent.values() if s is not None)
    gradients: dict[str, int] = {name: allocator.alloc(size) for name, size in joint.tangents.items()}
    for event in backward.events:
        saved = sent.get(event.storage)
        if saved is None or event.nbytes != FREE:
            _play([event], gradients, allocator)
            continue
        holders[saved] -= 1
        if not holders[saved] and saved not in user and saved in live:
            allocator.free(live.pop(saved))
    backward_peak = allocator.peak_allocated - start
    for handle in (*live.values(), *gradients.values()):  # zero_grad, and the loss is forgotten
        allocator.free(handle)
    return StepPeaks(forward_peak, backward_peak, allocator.reserved)


def _play(events: Sequence[Event], live: dict[str, int], allocator: Allocator) -> None:
    for event in events:
        if event.transient:
            allocator.free(allocator.alloc(event.nbytes))
        elif event.nbytes != FREE:
            live[event.storage] = allocator.alloc(event.nbytes)
        elif event.storage in live:  # inputs of the forward are not counted
            allocator.free(live.pop(event.storage))
