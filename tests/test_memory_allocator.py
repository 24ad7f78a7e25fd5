"""The estimate's allocators follow the rules of CUDA's caching allocator."""

from __future__ import annotations

from trainer.estimate.allocator import CudaAllocator, ExpandableAllocator

MIB = 2**20


def test_allocator_follows_the_documented_rules() -> None:
    allocator = CudaAllocator()
    small = allocator.malloc(1)
    assert (allocator.allocated, allocator.reserved) == (512, 2 * MIB)
    medium = allocator.malloc(3 * MIB)
    assert allocator.reserved == 22 * MIB
    large = allocator.malloc(30 * MIB + 1)
    assert allocator.reserved == 54 * MIB
    allocator.free(large)
    # The free block has 32 MiB. After 31.5 MiB, less than 1 MiB would remain, so the whole block is returned.
    again = allocator.malloc(31 * MIB + MIB // 2)
    assert again.size == 32 * MIB and allocator.reserved == 54 * MIB
    # Another stream cannot use the free blocks of this stream.
    allocator.free(again)
    other = allocator.malloc(30 * MIB, stream=1)
    assert allocator.reserved == 84 * MIB
    for block in (small, medium, other):
        allocator.free(block)
    assert allocator.allocated == 0
    # Adjacent free blocks have merged, so the 20 MiB segment serves one request again.
    whole = allocator.malloc(20 * MIB)
    assert whole.size == 20 * MIB and allocator.reserved == 84 * MIB


def test_expandable_segments_grow_and_leave_nothing_between_them() -> None:
    allocator = ExpandableAllocator()
    first, second, third = (allocator.malloc(size * MIB) for size in (30, 15, 12))
    assert (allocator.allocated, allocator.reserved) == (57 * MIB, 60 * MIB)
    # A free gap in the middle is used before the end, and it is split to the byte.
    allocator.free(second)
    inner = allocator.malloc(14 * MIB)
    assert inner.number < third.number and inner.size == 14 * MIB
    # The free end of 3 MiB grows by one granule; the gap of 1 MiB is too small.
    end = allocator.malloc(20 * MIB)
    assert allocator.reserved == 80 * MIB and end.size == 20 * MIB
    small, other = allocator.malloc(1), allocator.malloc(MIB, stream=1)
    assert allocator.reserved == 84 * MIB
    for block in (first, inner, third, end, small, other):
        allocator.free(block)
    assert allocator.allocated == 0
    # All blocks have merged. The whole segment serves one request and grows for a larger one.
    assert allocator.malloc(80 * MIB).size == 80 * MIB and allocator.reserved == 84 * MIB
    assert allocator.malloc(1 + 20 * MIB).size == 512 + 20 * MIB and allocator.reserved == 124 * MIB
