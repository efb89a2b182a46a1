"""Giving cached memory back to the driver: garbage collection, retry at the limit, `empty_cache`."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from memplan.memory.allocator_blocks import ADDRESS_BITS, Block, Pool, SegmentEvent
from memplan.memory.allocator_expandable import unmap_block

if TYPE_CHECKING:
    from memplan.memory.allocator import CachingAllocator


def garbage_collect_cached_blocks(allocator: CachingAllocator) -> None:
    """Free large unsplit blocks of above-average age while reserved is over the threshold.

    `garbage_collect_cached_blocks`; age is the number of lookups in the large pool since the block was freed.
    """
    config = allocator.config
    assert config.limit_bytes is not None
    threshold = int(config.garbage_collection_threshold * config.limit_bytes)
    if allocator.reserved_bytes <= threshold:
        return
    target = allocator.reserved_bytes - threshold
    waiting = [block for pool in allocator.pools() if not pool.is_small for block in pool.blocks if not block.is_split]
    total_age = sum(allocator.num_large_lookups - block.gc_base for block in waiting)
    reclaimed, freed = 0, True
    while reclaimed < target and freed and waiting:
        age_threshold = total_age / len(waiting)
        freed, kept = False, []
        for block in waiting:
            age = allocator.num_large_lookups - block.gc_base
            if age >= age_threshold:
                freed = True
                reclaimed += block.size_bytes
                total_age -= age
                _release_block(allocator, block)
            else:
                kept.append(block)
        waiting = kept


def release_available_cached_blocks(allocator: CachingAllocator, pool: Pool, size: int) -> bool:
    """With `max_split_size` set: free one oversize block that is large enough, else several, largest first.

    Returns whether enough was freed (`release_available_cached_blocks`).
    """
    max_split = allocator.config.max_split_size_bytes
    if max_split is None or allocator.config.expandable_segments:
        return False
    wanted = max(size, max_split)
    at = bisect_left(pool.keys, wanted << ADDRESS_BITS)
    if at < len(pool.keys):
        _release_block(allocator, pool.blocks[at])
        return True
    released = 0
    while released < wanted and pool.blocks and pool.blocks[-1].size_bytes >= max_split:
        released += pool.blocks[-1].size_bytes
        _release_block(allocator, pool.blocks[-1])
    return released >= wanted


def release_cached_blocks(allocator: CachingAllocator) -> None:
    """Free every segment that is wholly free, and unmap every free page (`release_cached_blocks`)."""
    pools = list(allocator.pools())
    for is_small in (False, True):
        for pool in pools:
            if pool.is_small is is_small:
                _release_blocks(allocator, pool)


def _release_blocks(allocator: CachingAllocator, pool: Pool) -> None:
    for block in list(pool.blocks):
        if allocator.config.expandable_segments:
            unmap_block(allocator, block)
        elif not block.is_split:
            _release_block(allocator, block)


def _release_block(allocator: CachingAllocator, block: Block) -> None:
    assert not block.is_split
    block.pool.remove(block)
    del allocator.heads[block.address]
    allocator.unreserve(
        SegmentEvent("segment_free", block.address, block.size_bytes, block.pool.stream),
    )
