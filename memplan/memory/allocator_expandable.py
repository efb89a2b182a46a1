"""Expandable segments: one address range a stream and pool, backed by physical pages as it grows.

`PYTORCH_ALLOC_CONF=expandable_segments:True`. Pages are 2 MiB in the small pool and 20 MiB
(`large_segment_size_mb`) in the large one: what is mapped is a whole number of pages, so that reserved memory
grows by pages, not by the request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.memory.allocator_blocks import FREE, UNMAPPED, Block, Pool, SegmentEvent, new_block

if TYPE_CHECKING:
    from memplan.memory.allocator import CachingAllocator

# torch reserves addresses for 9/8 of the device's memory (`ExpandableSegment`), which a step does not use up;
# any size above every device's does the same.
ADDRESS_SPACE_BYTES = 1 << 40


def try_allocate_expandable_block(allocator: CachingAllocator, pool: Pool, size: int) -> Block | None:
    """A free block of at least `size` bytes, off its list, or None if the device has no more pages.

    Pages mapped before the device ran out stay mapped (`try_allocate_expandable_block`).
    """
    block: Block | None = _find_expandable_block(allocator, pool, size)
    assert block is not None
    if block.state == UNMAPPED:
        block = _map_block(allocator, block, min(block.size_bytes, size))
    while block is not None and block.size_bytes < size:
        following = block.next
        assert following is not None
        block = _map_block(allocator, following, min(size - block.size_bytes, following.size_bytes))
    if block is not None:
        pool.remove(block)
    return block


def room(block: Block) -> int:
    """What `block` can grow to: best fit weighs it by that (`expandable_size` in `get_free_block`)."""
    following = block.next
    if following is not None and following.state == UNMAPPED:
        return block.size_bytes + following.size_bytes
    return block.size_bytes


def unmap_block(allocator: CachingAllocator, block: Block) -> None:
    """Give back the whole pages inside the free `block`; what is left of it stays free (`unmap_block`).

    A segment with nothing mapped is dropped (`release_expandable_segment`).
    """
    pool, page = block.pool, block.pool.page_bytes
    head = block
    while head.prev is not None:
        head = head.prev
    start = head.address + -(-(block.address - head.address) // page) * page
    end = head.address + (block.address + block.size_bytes - head.address) // page * page
    if start >= end:
        return
    pool.remove(block)
    if end < block.address + block.size_bytes:
        pool.insert(block.cut(end - block.address, FREE))
    hole = block
    if start > block.address:
        hole = block.cut(start - block.address, UNMAPPED)
        pool.insert(block)
    hole.state = UNMAPPED
    hole = _merge(hole)
    pool.insert_unmapped(hole)
    allocator.unreserve(SegmentEvent("segment_unmap", start, end - start, pool.stream))
    if not hole.is_split:
        pool.unmapped.remove(hole)
        del allocator.heads[hole.address]


def _find_expandable_block(allocator: CachingAllocator, pool: Pool, size: int) -> Block:
    """The lowest run of free and unmapped blocks that holds `size`, else a new segment."""
    for unmapped in pool.unmapped:
        first = unmapped
        if first.prev is not None and first.prev.state == FREE:
            first = first.prev
        found = 0
        block: Block | None = first
        while found < size and block is not None and block.state in (FREE, UNMAPPED):
            found += block.size_bytes
            block = block.next
        if found >= size:
            return first
    address = allocator.new_segment_address(ADDRESS_SPACE_BYTES)
    segment = new_block(pool, address, ADDRESS_SPACE_BYTES // pool.page_bytes * pool.page_bytes, UNMAPPED)
    allocator.heads[address] = segment
    pool.insert_unmapped(segment)
    return segment


def _map_block(allocator: CachingAllocator, block: Block, size: int) -> Block | None:
    """Back the first `size` bytes of the unmapped `block` by pages (`map_block`, `ExpandableSegment::map`).

    Returns the free block it becomes part of, or None, with nothing mapped, if the device has too few left.
    """
    pool = block.pool
    mapped = -(-size // pool.page_bytes) * pool.page_bytes  # an unmapped block starts on a page
    if not allocator.device_can_give(mapped):
        return None
    pool.unmapped.remove(block)
    if mapped < block.size_bytes:
        pool.insert_unmapped(block.cut(mapped, UNMAPPED))
    block.state = FREE
    start = block.address
    merged = _merge(block)
    pool.insert(merged)
    allocator.reserve(SegmentEvent("segment_map", start, mapped, pool.stream))
    return merged


def _merge(block: Block) -> Block:
    """Merge `block` with neighbours in the same state, which leave their list; returns the merged block."""
    pool = block.pool
    if block.next is not None and block.next.state == block.state:
        _take_off(pool, block.next)
        block.absorb_next()
    before = block.prev
    if before is not None and before.state == block.state:
        _take_off(pool, before)
        before.absorb_next()
        return before
    return block


def _take_off(pool: Pool, block: Block) -> None:
    if block.state == FREE:
        pool.remove(block)
    else:
        pool.unmapped.remove(block)
