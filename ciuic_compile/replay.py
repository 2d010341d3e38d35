"""What Inductor will really allocate: its generated code's own allocations and frees, replayed.

The plan's first peak comes from ``simulate.py``, before Inductor has scheduled anything. Once code exists,
the wrapper's lines say which buffer is allocated, reused and freed when (``compat_wrapper.py`` reads them);
played through the device's allocator, forward and then backward, they give the peak of the step. What a
library takes at its first call and keeps (cuBLAS's workspaces) is reserved, but in no later step's peak. Left
out: temporaries of external kernels that ``workspace.py`` does not know, the optimizer, gradients that
accumulate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .allocator import Allocator
from .codecs.base import Size


@dataclass(frozen=True)
class Event:
    """One storage appears (``nbytes`` > 0), or goes (``nbytes`` == -1).

    ``lasting`` bytes are those that a library takes the first time that a thread calls it, and keeps:
    ``storage`` is its name, and the device says how many they are. ``size`` is ``nbytes`` as an expression of
    the dynamic sizes; None where it is fixed.
    """

    storage: str
    nbytes: int
    lasting: bool = False
    size: Size | None = None


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
        sizes: their bytes as expressions of the dynamic sizes, where they are not fixed.
        holds_tangents: autograd keeps them until the backward returns, whatever it frees.
    """

    outputs: int
    num_fwd_outputs: int
    received: Mapping[str, int]
    tangents: Mapping[str, int]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    holds_tangents: bool = False


@dataclass(frozen=True)
class StepPeaks:
    """Bytes above parameters and inputs: in use at most in either graph, and taken from the device.

    ``lasting`` of the reserved bytes are workspaces that libraries keep: in use when the last step begins.
    """

    forward: int
    backward: int
    reserved: int
    lasting: int = 0

    @property
    def peak(self) -> int:
        """The step's allocated peak, in bytes."""
        return max(self.forward, self.backward)


class _Kept:
    """The workspaces that libraries keep, one of each for a thread."""

    def __init__(self, sizes: Mapping[str, int], allocator: Allocator) -> None:
        self._sizes, self._allocator = sizes, allocator
        self._taken: set[tuple[str, str]] = set()
        self.nbytes = 0

    def called(self, library: str, thread: str) -> None:
        """A thread calls a library."""
        if (library, thread) not in self._taken:
            self._taken.add((library, thread))
            before = self._allocator.allocated
            self._allocator.alloc(self._sizes.get(library, 0))
            self.nbytes += self._allocator.allocated - before


def replay(
    forward: Trace,
    backward: Trace,
    joint: Joint,
    allocator: Allocator,
    steps: int = 2,
    workspaces: Mapping[str, int] | None = None,
) -> StepPeaks:
    """Play training steps through an allocator; the peaks are those of the last one.

    Args:
        steps: the first fills the allocator's cache, as a warm-up does.
        workspaces: bytes that each library keeps for a thread; the backward runs in autograd's own.
    """
    peaks, kept = StepPeaks(0, 0, 0), _Kept(workspaces or {}, allocator)
    for _ in range(steps):
        peaks = _step(forward, backward, joint, allocator, kept)
    return peaks


def _step(forward: Trace, backward: Trace, joint: Joint, allocator: Allocator, kept: _Kept) -> StepPeaks:
    start = allocator.allocated
    live: dict[str, int] = {}
    allocator.peak_allocated = start
    for event in forward.events:
        _play(event, live, allocator, kept, "forward")
    forward_peak = allocator.peak_allocated - start
    returned = {s for s in forward.outputs if s is not None}
    for storage in [s for s in live if s not in returned]:
        allocator.free(live.pop(storage))
    allocator.peak_allocated = allocator.allocated
    user = {s for s in forward.outputs[: joint.num_fwd_outputs] if s is not None}
    sent = {name: forward.outputs[index] for name, index in joint.received.items()}
    holders = Counter(s for s in sent.values() if s is not None)
    gradients: dict[str, int] = {name: allocator.alloc(size) for name, size in joint.tangents.items()}
    for event in backward.events:
        if joint.holds_tangents and event.nbytes == FREE and event.storage in joint.tangents:
            continue
        saved = sent.get(event.storage)
        if saved is None or event.nbytes != FREE:
            _play(event, gradients, allocator, kept, "backward")
            continue
        holders[saved] -= 1
        if not holders[saved] and saved not in user and saved in live:
            allocator.free(live.pop(saved))
    backward_peak = allocator.peak_allocated - start
    for handle in (*live.values(), *gradients.values()):  # zero_grad, and the loss is forgotten
        allocator.free(handle)
    return StepPeaks(forward_peak, backward_peak, allocator.reserved, kept.nbytes)


def _play(event: Event, live: dict[str, int], allocator: Allocator, kept: _Kept, thread: str) -> None:
    if event.lasting:
        kept.called(event.storage, thread)
    elif event.nbytes != FREE:
        live[event.storage] = allocator.alloc(event.nbytes)
    elif event.storage in live:  # inputs of the forward are not counted
        allocator.free(live.pop(event.storage))
