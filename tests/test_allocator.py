"""The caching allocator's rules (c10/cuda/CUDACachingAllocator.cpp) by hand, and against a real one."""

from __future__ import annotations

import random

import pytest
import torch

from ciuic_compile.allocator import MIB, CachingAllocator, ExactAllocator


def test_requests_are_rounded_to_512_bytes() -> None:
    cuda, exact = CachingAllocator(), ExactAllocator()
    for allocator in (cuda, exact):
        allocator.alloc(4)
        allocator.alloc(513)
    assert (cuda.allocated, exact.allocated) == (512 + 1024, 4 + 513)
    assert (cuda.reserved, exact.reserved) == (2 * MIB, 4 + 513)


def test_nothing_is_nothing() -> None:
    cuda = CachingAllocator()
    cuda.free(cuda.alloc(0))
    assert (cuda.allocated, cuda.reserved) == (0, 0)


def test_segments() -> None:
    cuda = CachingAllocator()
    cuda.alloc(MIB)  # small: 2 MiB
    cuda.alloc(MIB + 1)  # medium: 20 MiB
    cuda.alloc(30 * MIB + 1)  # large: its own, in steps of 2 MiB
    assert cuda.reserved == (2 + 20 + 32) * MIB
    cuda.alloc(18 * MIB)  # what is left of the medium segment
    assert cuda.reserved == (2 + 20 + 32) * MIB


def test_a_large_block_is_not_split_for_a_mebibyte() -> None:
    cuda = CachingAllocator()
    cuda.alloc(11 * MIB)  # of 12: the rest is no block of its own, and counts as allocated
    assert cuda.allocated == 12 * MIB


def test_freed_neighbours_become_one_block() -> None:
    cuda = CachingAllocator()
    a, b, c = (cuda.alloc(6 * MIB) for _ in range(3))  # one medium segment
    keep = cuda.alloc(2 * MIB)
    for handle in (a, c, b):
        cuda.free(handle)
    cuda.alloc(18 * MIB)
    assert cuda.reserved == 20 * MIB
    cuda.free(keep)


def test_the_smallest_block_that_fits_is_taken() -> None:
    cuda = CachingAllocator()
    big, small = cuda.alloc(40 * MIB), cuda.alloc(30 * MIB)
    cuda.free(big)
    cuda.free(small)
    cuda.alloc(28 * MIB)
    cuda.alloc(40 * MIB)
    assert cuda.reserved == 70 * MIB


@pytest.mark.parametrize(
    ("nbytes", "segment"),
    [
        (1 * MIB, 2 * MIB),  # kSmallSize is small
        (1 * MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounded to kMinLargeAlloc, which gets its own
        (12 * MIB, 12 * MIB),
        (12 * MIB + 1, 14 * MIB),
    ],
)
def test_the_edges_of_the_segment_sizes(nbytes: int, segment: int) -> None:
    cuda = CachingAllocator()
    cuda.alloc(nbytes)
    assert cuda.reserved == segment


@pytest.mark.parametrize(("left", "split"), [(MIB, False), (MIB + 512, True)])
def test_a_large_block_is_split_above_a_mebibyte(left: int, split: bool) -> None:
    cuda = CachingAllocator()
    cuda.alloc(40 * MIB - left)
    assert cuda.allocated == 40 * MIB - (left if split else 0)


def test_a_small_block_is_split_at_512_bytes_and_pools_do_not_mix() -> None:
    cuda = CachingAllocator()
    cuda.alloc(MIB)
    cuda.alloc(MIB - 512)
    cuda.alloc(512)  # the rest of the segment, to the last byte
    assert (cuda.allocated, cuda.reserved) == (2 * MIB, 2 * MIB)
    cuda.free(cuda.alloc(15 * MIB))
    cuda.alloc(512)  # none of the large pool's free bytes
    assert cuda.reserved == (2 + 16 + 2) * MIB


def test_of_equal_blocks_the_lowest_address_is_taken() -> None:
    cuda = CachingAllocator()
    first, second = cuda.alloc(30 * MIB), cuda.alloc(30 * MIB)
    cuda.free(second)
    cuda.free(first)
    assert cuda.alloc(30 * MIB) == first


def test_segments_are_never_joined() -> None:
    cuda = CachingAllocator()
    for handle in [cuda.alloc(20 * MIB), cuda.alloc(20 * MIB)]:
        cuda.free(handle)
    cuda.alloc(40 * MIB)
    assert cuda.reserved == 80 * MIB


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_freed_comes_back(seed: int) -> None:
    source, cuda = random.Random(seed), CachingAllocator()
    for _ in range(2):
        handles = [cuda.alloc(source.randint(1, 1 << source.randint(8, 26))) for _ in range(200)]
        source.shuffle(handles)
        for handle in handles:
            cuda.free(handle)
    assert cuda.allocated == 0
    reserved = cuda.reserved
    assert cuda.peak_allocated <= reserved
    cuda.free(cuda.alloc(512))
    assert cuda.reserved == reserved


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_against_torchs_own(seed: int) -> None:
    source, cuda = random.Random(seed), CachingAllocator()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    if torch.cuda.memory_reserved():
        pytest.skip("other tests hold memory in this process")
    live: list[tuple[int, torch.Tensor]] = []
    for _ in range(300):
        if live and source.random() < 0.45:
            handle, tensor = live.pop(source.randrange(len(live)))
            cuda.free(handle)
            del tensor
        else:
            size = source.randint(1, 1 << source.randint(8, 26))
            live.append((cuda.alloc(size), torch.empty(size, dtype=torch.uint8, device="cuda")))
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (
            cuda.allocated,
            cuda.reserved,
        )
