"""Play tapes of allocations and frees on the caching allocator.

A tape is a sequence of (slot, size in bytes): a size above 0 allocates into that slot, 0 frees what is there.
Slots are small integers that index a list, which outlives the tape: what one tape leaves, another may free.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from memplan.memory.allocator_blocks import ADDRESS_BITS, ALLOCATED, FREE, Block
from memplan.memory.allocator_sizes import SMALL_SIZE_BYTES, round_size

if TYPE_CHECKING:
    from memplan.memory.allocator import CachingAllocator

Slots = list[Block | None]


def replay(allocator: CachingAllocator, tape: Iterable[tuple[int, int]], slots: Slots, stream: int = 0) -> None:
    """Play `tape` once; `slots` holds the live blocks, None where there is none.

    A request gets the smallest free block of the stream's pool that is large enough, of these the one of the lowest
    address (`get_free_block`); else one of a new segment. What is left over stays free if it is worth splitting off
    (`should_split`, `alloc_found_block`). A block that is freed merges with free neighbours (`free_block`).

    Written out in one piece, with what changes in local names: an estimate spends most of its time here.

    Raises:
        OutOfMemory: no room below the limit, even after giving back what is cached; `slots` then holds what was live.
    """
    if stream != allocator.stream:
        allocator.use_stream(stream)
    small, large = allocator.small, allocator.large
    divisions = allocator.config.roundup_power2_divisions
    fits_any, split_below = allocator.fits_any, allocator.split_below
    allocated, peak = allocator.allocated_bytes, allocator.peak_allocated_bytes
    try:
        for slot, num_bytes in tape:
            if num_bytes:
                size = round_size(num_bytes, divisions) if divisions else (num_bytes + 511) & -512
                pool = small if size <= SMALL_SIZE_BYTES else large
                keys, blocks = pool.keys, pool.blocks
                at = bisect_left(keys, size << ADDRESS_BITS)
                if not fits_any:
                    at = allocator.best_fit(pool, size, at)
                fits = at < len(keys)
                block = blocks[at] if fits else allocator.take_block(pool, size)
                rest_bytes = block.size_bytes - size
                if rest_bytes >= pool.min_rest_bytes and size < split_below:
                    rest = Block()
                    rest.pool = pool
                    rest.address = address = block.address + size
                    rest.size_bytes = rest_bytes
                    rest.state = FREE
                    rest.prev = block
                    rest.next = following = block.next
                    if following is not None:
                        following.prev = rest
                    block.next = rest
                    block.size_bytes = size
                    rest.key = key = rest_bytes << ADDRESS_BITS | address
                    rest.gc_base = allocator.num_large_lookups
                    allocated += size
                    if fits and (at == 0 or keys[at - 1] < key):
                        keys[at] = key
                        blocks[at] = rest
                    else:
                        if fits:
                            del keys[at], blocks[at]
                        at = bisect_left(keys, key)
                        keys.insert(at, key)
                        blocks.insert(at, rest)
                else:
                    allocated += block.size_bytes
                    if fits:
                        del keys[at], blocks[at]
                block.state = ALLOCATED
                block.requested_bytes = num_bytes
                slots[slot] = block
                if allocated > peak:
                    peak = allocated
                continue
            freed = slots[slot]
            assert freed is not None and freed.state == ALLOCATED
            slots[slot] = None
            size = freed.size_bytes
            allocated -= size
            keys, blocks = freed.pool.keys, freed.pool.blocks
            freed.state = FREE
            hole = -1  # where in the list a merged neighbour was
            neighbour = freed.prev
            if neighbour is not None and neighbour.state == FREE:
                hole = bisect_left(keys, neighbour.key)
                size += neighbour.size_bytes
                neighbour.next = following = freed.next
                if following is not None:
                    following.prev = neighbour
                freed = neighbour
            neighbour = freed.next
            if neighbour is not None and neighbour.state == FREE:
                if hole >= 0:
                    del keys[hole], blocks[hole]
                hole = bisect_left(keys, neighbour.key)
                size += neighbour.size_bytes
                freed.next = following = neighbour.next
                if following is not None:
                    following.prev = freed
            freed.size_bytes = size
            freed.key = key = size << ADDRESS_BITS | freed.address
            freed.gc_base = allocator.num_large_lookups
            if hole >= 0 and (hole + 1 == len(keys) or key < keys[hole + 1]):
                keys[hole] = key
                blocks[hole] = freed
            else:
                if hole >= 0:
                    del keys[hole], blocks[hole]
                at = bisect_left(keys, key)
                keys.insert(at, key)
                blocks.insert(at, freed)
    finally:
        allocator.allocated_bytes, allocator.peak_allocated_bytes = allocated, peak


def repeat(
    allocator: CachingAllocator,
    tape: Sequence[tuple[int, int]],
    num_times: int,
    slots: Slots,
    stream: int = 0,
) -> int:
    """Play `tape` `num_times`, skipping what cannot change anything; returns the number of plays made.

    Exact: once memory lies as it did before an earlier play, the plays since then would be repeated, so that
    only what is left of that cycle is played. Counters (`segment_events`, `num_alloc_retries`) are those of
    the plays made. Nothing is skipped while garbage collection is on: blocks then differ by age.

    Raises:
        OutOfMemory: as `replay`.
    """
    seen: dict[object, int] = {}
    for played in range(num_times):
        if not allocator.collects_garbage:
            layout = (allocator.layout(), tuple(-1 if block is None else block.address for block in slots))
            if layout in seen:
                left = (num_times - played) % (played - seen[layout])
                for _ in range(left):
                    replay(allocator, tape, slots, stream)
                return played + left
            seen[layout] = played
        replay(allocator, tape, slots, stream)
    return num_times
