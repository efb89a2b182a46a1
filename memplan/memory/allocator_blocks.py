"""Blocks of device memory and the free lists they wait in."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal, NamedTuple

from memplan.memory.allocator_sizes import MIN_BLOCK_BYTES, SMALL_BUFFER_BYTES, SMALL_SIZE_BYTES

# A sort key is `size << ADDRESS_BITS | address`; user addresses have 47 bits on the platforms torch runs on.
ADDRESS_BITS = 48

ALLOCATED, FREE, UNMAPPED = 0, 1, 2
_STATES: tuple[BlockState, ...] = ("allocated", "free", "unmapped")

BlockState = Literal["allocated", "free", "unmapped"]
SegmentAction = Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]


class SegmentEvent(NamedTuple):
    """One call to the driver, in the words of torch's `TraceEntry::Action`."""

    action: SegmentAction
    address: int
    size_bytes: int
    stream: int


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A block as `CachingAllocator.segments` shows it; `requested_bytes` is 0 unless it is allocated."""

    address: int
    size_bytes: int
    requested_bytes: int
    state: BlockState


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """A mapped range and its blocks, by ascending address (`DeviceCachingAllocator::snapshot`)."""

    address: int
    size_bytes: int
    stream: int
    is_large: bool
    blocks: tuple[BlockInfo, ...]


class Block:
    """A range of one segment; `prev` and `next` are its neighbours in that segment. Filled in by its maker.

    The leftmost block of a range keeps its identity when it is split or merged, so that the first block of a
    segment is the same object for the life of the segment.
    """

    __slots__ = (
        "address",
        "gc_base",
        "key",
        "next",
        "pool",
        "prev",
        "requested_bytes",
        "size_bytes",
        "state",
    )

    address: int
    size_bytes: int
    requested_bytes: int
    state: int
    pool: Pool
    prev: Block | None
    next: Block | None
    key: int  # its sort key while it is free
    gc_base: int  # lookups made when it came into its free list: its age for garbage collection

    def absorb_next(self) -> None:
        """Merge the next block into this one (`try_merge_blocks`); the caller has taken it off its list."""
        gone = self.next
        assert gone is not None
        self.size_bytes += gone.size_bytes
        self.next = gone.next
        if gone.next is not None:
            gone.next.prev = self

    def cut(self, size_bytes: int, state: int) -> Block:
        """Keep the first `size_bytes` and return the rest as a new block in `state`."""
        rest = new_block(self.pool, self.address + size_bytes, self.size_bytes - size_bytes, state)
        rest.prev = self
        rest.next = self.next
        if self.next is not None:
            self.next.prev = rest
        self.next = rest
        self.size_bytes = size_bytes
        return rest

    @property
    def is_split(self) -> bool:
        """Whether it is only part of its segment (`Block::is_split`)."""
        return self.prev is not None or self.next is not None

    def info(self) -> BlockInfo:
        requested = self.requested_bytes if self.state == ALLOCATED else 0
        return BlockInfo(self.address, self.size_bytes, requested, _STATES[self.state])


def new_block(pool: Pool, address: int, size_bytes: int, state: int) -> Block:
    """A block with no neighbours."""
    block = Block()
    block.pool = pool
    block.address = address
    block.size_bytes = size_bytes
    block.requested_bytes = 0
    block.state = state
    block.prev = block.next = None
    block.gc_base = 0
    return block


class Pool:
    """The free blocks of one stream, of the small or the large pool (`BlockPool`).

    torch keeps one set a pool, ordered by (stream, size, address) (`BlockComparatorSize`), and never looks
    past the end of a stream's part of it: one list a stream is the same. `keys` and `blocks` run in parallel.
    """

    __slots__ = ("blocks", "is_small", "keys", "min_rest_bytes", "page_bytes", "stream", "unmapped")

    def __init__(self, stream: int, *, is_small: bool, expandable: bool, large_segment_bytes: int) -> None:
        self.stream = stream
        self.is_small = is_small
        self.keys: list[int] = []
        self.blocks: list[Block] = []
        self.unmapped: list[Block] = []  # by ascending address
        # should_split: remaining >= 512 (small pool, expandable segments), else remaining > 1 MiB;
        # every size is a multiple of 512
        fine = is_small or expandable
        self.min_rest_bytes = MIN_BLOCK_BYTES if fine else SMALL_SIZE_BYTES + MIN_BLOCK_BYTES
        # find_expandable_block: what an expandable segment maps at a time
        self.page_bytes = SMALL_BUFFER_BYTES if is_small else large_segment_bytes

    def insert(self, block: Block) -> None:
        block.key = key = block.size_bytes << ADDRESS_BITS | block.address
        at = bisect_left(self.keys, key)
        self.keys.insert(at, key)
        self.blocks.insert(at, block)

    def remove(self, block: Block) -> None:
        at = bisect_left(self.keys, block.key)
        assert self.blocks[at] is block
        del self.keys[at], self.blocks[at]

    def insert_unmapped(self, block: Block) -> None:
        self.unmapped.append(block)
        self.unmapped.sort(key=_address)


def _address(block: Block) -> int:
    return block.address
