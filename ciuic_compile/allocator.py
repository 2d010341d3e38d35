"""Which bytes a device's allocator hands out and reserves, given what is asked of it.

The CUDA caching allocator rounds requests to 512 bytes, takes the smallest free block that fits, splits it
only where enough is left over, and never gives a segment back on its own. Rules and constants: torch's
c10/cuda/CUDACachingAllocator.cpp (default settings, one stream). What it leaves out: other streams, the
switches of PYTORCH_CUDA_ALLOC_CONF, and giving segments back when memory runs out.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Protocol

MIB = 2**20
ROUND = 512
SMALL = MIB  # requests up to this come from segments of 2 MiB
SMALL_SEGMENT = 2 * MIB
MEDIUM = 10 * MIB  # requests up to this come from segments of 20 MiB, larger ones get their own
MEDIUM_SEGMENT = 20 * MIB
SEGMENT_ROUND = 2 * MIB


class Allocator(Protocol):
    """Bytes in use and bytes taken from the device, now and at most."""

    allocated: int
    peak_allocated: int
    reserved: int

    def alloc(self, nbytes: int) -> int:
        """Take ``nbytes``; returns a handle."""

    def free(self, handle: int) -> None:
        """Give a handle's bytes back."""


class ExactAllocator:
    """Hands out what is asked for and gives back what is freed: a CPU, as far as torch counts."""

    def __init__(self) -> None:
        self.allocated = self.peak_allocated = self.reserved = 0
        self._sizes: list[int] = []

    def alloc(self, nbytes: int) -> int:
        self._sizes.append(nbytes)
        self.allocated += nbytes
        self.peak_allocated = self.reserved = max(self.peak_allocated, self.allocated)
        return len(self._sizes) - 1

    def free(self, handle: int) -> None:
        self.allocated -= self._sizes[handle]


@dataclass
class _Block:
    address: int
    size: int
    small: bool
    previous: _Block | None = None
    next: _Block | None = None
    in_use: bool = False

    @property
    def key(self) -> tuple[int, int]:
        return self.size, self.address


class CachingAllocator:
    """torch's CUDA caching allocator at its default settings, on one stream.

    Args:
        granularity: what requests are rounded up to, in bytes.
    """

    def __init__(self, granularity: int = ROUND) -> None:
        self._round = granularity
        self.allocated = self.peak_allocated = self.reserved = 0
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # small? -> sorted keys
        self._blocks: dict[int, _Block] = {}  # by address
        self._end = 0

    def alloc(self, nbytes: int) -> int:
        """Take ``nbytes`` (0 takes nothing); returns the block's address."""
        if nbytes == 0:
            return -1
        size = -(-nbytes // self._round) * self._round
        small = size <= SMALL
        pool = self._free[small]
        position = bisect.bisect_left(pool, (size, -1))
        block = self._blocks[pool.pop(position)[1]] if position < len(pool) else self._segment(size, small)
        left = block.size - size
        if left >= self._round if small else left > SMALL:
            rest = _Block(block.address + size, left, small, block, block.next)
            if block.next is not None:
                block.next.previous = rest
            block.size, block.next = size, rest
            self._blocks[rest.address] = rest
            bisect.insort(pool, rest.key)
        block.in_use = True
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block.address

    def free(self, handle: int) -> None:
        """Give a block back; free neighbours of one segment become one block."""
        if handle < 0:
            return
        block = self._blocks[handle]
        block.in_use = False
        self.allocated -= block.size
        pool = self._free[block.small]
        for other in (block.previous, block.next):
            if other is None or other.in_use:
                continue
            pool.pop(bisect.bisect_left(pool, other.key))
            first, second = (other, block) if other is block.previous else (block, other)
            first.size += second.size
            first.next = second.next
            if second.next is not None:
                second.next.previous = first
            del self._blocks[second.address]
            block = first
        bisect.insort(pool, block.key)

    def _segment(self, size: int, small: bool) -> _Block:
        """A new segment from the device, as one block."""
        if small:
            total = SMALL_SEGMENT
        elif size < MEDIUM:
            total = MEDIUM_SEGMENT
        else:
            total = -(-size // SEGMENT_ROUND) * SEGMENT_ROUND
        block = _Block(self._end, total, small)
        self._end += total + SEGMENT_ROUND  # segments are never neighbours
        self._blocks[block.address] = block
        self.reserved += total
        return block
