"""The CUDA caching allocator, as arithmetic: which segments a sequence of allocations asks of the driver.

    request            rounded up to 512 bytes
    up to 1 MiB        cut from segments of 2 MiB          (small pool)
    below 10 MiB       cut from segments of 20 MiB         (large pool)
    from 10 MiB        a segment of its own, rounded up to 2 MiB; reused for later requests that fit

With expandable segments, every stream and pool has one segment, which grows by 2 MiB (small) or 20 MiB (large).

Allocation takes the best fit among the free blocks of its stream and pool; a large block is cut only where more than
1 MiB remains; free neighbours merge. Nothing returns to the driver before an allocation fails. Reserved memory is the
sum of the segments, the value of `torch.cuda.memory_reserved`. Source: c10/cuda/CUDACachingAllocator.cpp of torch 2.13.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict

ROUND = 512
SMALL, LARGE, ALIGN = 2**20, 10 * 2**20, 2 * 2**20
SMALL_SEGMENT, LARGE_SEGMENT = 2 * 2**20, 20 * 2**20


class Block:
    """A piece of a segment, linked to its neighbours there. pool: the free blocks of its stream and size."""

    __slots__ = ("after", "before", "free", "number", "pool", "size")

    def __init__(self, number: int, size: int, pool: Pool) -> None:
        self.number, self.size, self.pool = number, size, pool
        self.free = False
        self.before: Block | None = None
        self.after: Block | None = None


Pool = list[tuple[int, int, Block]]
"""Size, number, block: in ascending order."""


class CudaAllocator:
    """Replays requests. allocated: bytes of the blocks handed out; reserved: bytes of all segments."""

    def __init__(self) -> None:
        self.allocated = self.reserved = 0
        self._count = 0
        self._pools: defaultdict[tuple[int, bool], Pool] = defaultdict(list)

    def malloc(self, size: int, stream: int = 0) -> Block:
        size = -(-max(size, 1) // ROUND) * ROUND
        small = size <= SMALL
        pool = self._pools[stream, small]
        index = bisect_left(pool, (size,))
        if index < len(pool):
            block = pool.pop(index)[2]
            block.free = False
        else:
            block = self._segment(size, pool, small=small)
        remaining = block.size - size
        if (remaining >= ROUND) if small else (remaining > SMALL):
            self._split(block, size)
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.size
        pool, before, after = block.pool, block.before, block.after
        if before is not None and before.free:
            pool.pop(bisect_left(pool, (before.size, before.number)))
            block.size += before.size
            block.number, block.before = before.number, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.free:
            pool.pop(bisect_left(pool, (after.size, after.number)))
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        block.free = True
        insort(pool, (block.size, block.number, block))

    def _segment(self, size: int, pool: Pool, *, small: bool) -> Block:
        if small:
            whole = SMALL_SEGMENT
        elif size < LARGE:
            whole = LARGE_SEGMENT
        else:
            whole = -(-size // ALIGN) * ALIGN
        self.reserved += whole
        self._count += 1
        # Numbers grow with the address, as far as one is known: segments are in order, and so are the blocks of one
        # segment.
        return Block(self._count << 40, whole, pool)

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.number + size, block.size - size, block.pool)
        rest.before, rest.after = block, block.after
        if rest.after is not None:
            rest.after.before = rest
        block.after, block.size = rest, size
        rest.free = True
        insort(block.pool, (rest.size, rest.number, rest))


class ExpandableAllocator(CudaAllocator):
    """The same allocator with `expandable_segments:True`: nothing is left over between segments, and any block may be
    cut."""

    def __init__(self) -> None:
        super().__init__()
        self._ends: dict[tuple[int, bool], Block] = {}

    def malloc(self, size: int, stream: int = 0) -> Block:
        size = -(-max(size, 1) // ROUND) * ROUND
        place = stream, size <= SMALL
        pool = self._pools[place]
        # The end of the segment counts as large as it can grow: it is taken when nothing else fits.
        index = bisect_left(pool, (size,))
        while index < len(pool) and pool[index][2] is self._ends[place]:
            index += 1
        block = pool.pop(index)[2] if index < len(pool) else self._grown(place, size)
        block.free = False
        if block.size - size >= ROUND:
            last = self._ends[place] is block
            self._split(block, size)
            if last:
                assert block.after is not None
                self._ends[place] = block.after
        self.allocated += block.size
        return block

    def free(self, block: Block) -> None:
        super().free(block)
        for place, end in self._ends.items():
            if block.after is None and end.pool is block.pool:
                self._ends[place] = block

    def _grown(self, place: tuple[int, bool], size: int) -> Block:
        """The end of the segment, with room for a request."""
        pool, end = self._pools[place], self._ends.get(place)
        if end is not None and end.free:
            pool.pop(bisect_left(pool, (end.size, end.number)))
            block = end
        else:
            self._count += end is None
            block = Block(self._count << 40 if end is None else end.number + end.size, 0, pool)
            block.before = end
            if end is not None:
                end.after = block
            self._ends[place] = block
        granule = SMALL_SEGMENT if place[1] else LARGE_SEGMENT
        added = -(-max(size - block.size, 0) // granule) * granule
        self.reserved += added
        block.size += added
        return block


class PlainAllocator:
    """Host memory: every request is exactly its size."""

    def __init__(self) -> None:
        self.allocated = 0

    @property
    def reserved(self) -> int:
        return self.allocated

    def malloc(self, size: int, stream: int = 0) -> Block:
        self.allocated += size
        return Block(0, size, [])

    def free(self, block: Block) -> None:
        self.allocated -= block.size
