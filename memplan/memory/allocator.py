"""torch's CUDA caching allocator on one device, in sizes alone: what requests and frees make it reserve.

Not modelled: the private pools of CUDA graphs and `torch.cuda.MemPool`, and `record_stream`, which holds back
a freed block while another stream uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memplan.memory.allocator_blocks import (
    ALLOCATED,
    FREE,
    UNMAPPED,
    Block,
    Pool,
    SegmentEvent,
    SegmentInfo,
    new_block,
)
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.allocator_expandable import room, try_allocate_expandable_block
from memplan.memory.allocator_release import (
    garbage_collect_cached_blocks,
    release_available_cached_blocks,
    release_cached_blocks,
)
from memplan.memory.allocator_replay import Slots, replay
from memplan.memory.allocator_sizes import segment_size

_NO_LIMIT = 1 << 62


class OutOfMemory(Exception):
    """The limit was reached with all cached memory given back: a signal inside memplan, no user's mistake."""

    def __init__(self, requested_bytes: int, reserved_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"{requested_bytes} B more than {reserved_bytes} B of {limit_bytes} B")
        self.requested_bytes = requested_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes

    @property
    def missing_bytes(self) -> int:
        """What the request is beyond the limit."""
        return self.requested_bytes + self.reserved_bytes - self.limit_bytes


class CachingAllocator:
    """`DeviceCachingAllocator`: `malloc` and `free` blocks, and read what that reserves.

    `allocated_bytes` is the sum of block sizes, as `torch.cuda.memory_allocated` has it: a block handed out
    unsplit counts whole. `requested_bytes` is the sum of what was asked for. `reserved_bytes` is what
    `torch.cuda.memory_reserved` has. `segment_events` lists every call to the driver.

    Addresses decide between free blocks of equal size: the lowest wins. By default a new segment lies above
    all before it and no address is used twice. The driver promises neither, so that `new_segment_address`,
    called with a segment's size, may say otherwise.
    """

    __slots__ = (
        "_next_address",
        "_pools",
        "allocated_bytes",
        "config",
        "fits_any",
        "heads",
        "large",
        "met_limit",
        "new_segment_address",
        "num_alloc_retries",
        "num_large_lookups",
        "num_ooms",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
        "reserved_bytes",
        "segment_events",
        "small",
        "split_below",
        "stream",
    )

    def __init__(
        self,
        config: AllocatorConfig | None = None,
        *,
        new_segment_address: Callable[[int], int] | None = None,
    ) -> None:
        self.config = config = config or AllocatorConfig()
        self.new_segment_address = new_segment_address or self._ascending_address
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_alloc_retries = self.num_ooms = 0
        self.num_large_lookups = 0
        self.met_limit = False  # whether the driver or the limit ever refused a request
        self.heads: dict[int, Block] = {}  # first block of each segment, by address
        self.segment_events: list[SegmentEvent] = []
        self._next_address = 0
        self._pools: dict[int, tuple[Pool, Pool]] = {}
        max_split = config.max_split_size_bytes
        self.fits_any = max_split is None and not config.expandable_segments and not self.collects_garbage
        # should_split: max_split_size does not hold for expandable segments
        self.split_below = _NO_LIMIT if max_split is None or config.expandable_segments else max_split
        self.use_stream(0)

    def malloc(self, num_bytes: int, stream: int = 0) -> Block:
        """A block of at least `num_bytes` (above 0: torch asks for no memory for an empty tensor).

        Raises:
            OutOfMemory: no room below the limit, even after giving back what is cached.
        """
        assert num_bytes > 0
        slots: Slots = [None]
        replay(self, ((0, num_bytes),), slots, stream)
        assert slots[0] is not None
        return slots[0]

    def free(self, block: Block) -> None:
        """Put `block`, from `malloc`, on its free list, merged with free neighbours."""
        replay(self, ((0, 0),), [block], self.stream)

    def reset_peak(self) -> None:
        """Start both peaks from what is held now (`resetPeakStats`)."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def empty_cache(self) -> None:
        """Give back what can be given back (`torch.cuda.empty_cache`)."""
        release_cached_blocks(self)

    def segments(self) -> list[SegmentInfo]:
        """Every mapped range by ascending address, as `torch.cuda.memory_snapshot` lists them."""
        found = []
        for head in sorted(self.heads.values(), key=lambda block: block.address):
            run: list[Block] = []
            for block in _chain(head):
                if block.state != UNMAPPED:
                    run.append(block)
                if run and (block.state == UNMAPPED or block.next is None):
                    size = sum(b.size_bytes for b in run)
                    infos = tuple(b.info() for b in run)
                    pool = head.pool
                    found.append(SegmentInfo(run[0].address, size, pool.stream, not pool.is_small, infos))
                    run = []
        return found

    def layout(self) -> object:
        """How free memory lies; with where the live blocks lie, this is all that later requests depend on."""
        pools = list(self.pools())
        return (
            tuple(self.heads),
            tuple(tuple(pool.keys) for pool in pools),
            tuple((block.address, block.size_bytes) for pool in pools for block in pool.unmapped),
        )

    @property
    def requested_bytes(self) -> int:
        """Sum of what was asked for, of the blocks that are handed out."""
        live = (block for head in self.heads.values() for block in _chain(head) if block.state == ALLOCATED)
        return sum(block.requested_bytes for block in live)

    @property
    def collects_garbage(self) -> bool:
        """Whether old blocks are freed on the way to the limit; without a limit they never are (`malloc`)."""
        return self.config.garbage_collection_threshold > 0.0 and self.config.limit_bytes is not None

    def pools(self) -> Iterator[Pool]:
        """Every pool, by stream."""
        for stream in sorted(self._pools):
            yield from self._pools[stream]

    def reserve(self, event: SegmentEvent) -> None:
        """Book memory taken from the driver."""
        self.segment_events.append(event)
        self.reserved_bytes += event.size_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def unreserve(self, event: SegmentEvent) -> None:
        """Book memory given back to the driver."""
        self.segment_events.append(event)
        self.reserved_bytes -= event.size_bytes

    def device_can_give(self, size_bytes: int) -> bool:
        """Whether the driver has `size_bytes` more."""
        capacity = self.config.capacity_bytes
        return capacity is None or self.reserved_bytes + size_bytes <= capacity

    def use_stream(self, stream: int) -> None:
        """From here on, requests are of `stream`."""
        if stream not in self._pools:
            expandable, large_segment = self.config.expandable_segments, self.config.large_segment_size_bytes
            self._pools[stream] = (
                Pool(stream, is_small=True, expandable=expandable, large_segment_bytes=large_segment),
                Pool(stream, is_small=False, expandable=expandable, large_segment_bytes=large_segment),
            )
        self.small, self.large = self._pools[stream]
        self.stream = stream

    def best_fit(self, pool: Pool, size: int, at: int) -> int:
        """Index of the block to use, given that of the first large enough; past the end for none."""
        if not pool.is_small:
            self.num_large_lookups += 1
        blocks = pool.blocks
        if at == len(blocks):
            return at
        if self.config.expandable_segments:
            while at + 1 < len(blocks) and room(blocks[at + 1]) < room(blocks[at]):
                at += 1
        max_split = self.config.max_split_size_bytes
        if max_split is None:
            return at
        # an oversize block is for oversize requests only, and only for those not much smaller
        if size < max_split <= blocks[at].size_bytes:
            return len(blocks)
        rounding = self.config.max_non_split_rounding_bytes or self.config.large_segment_size_bytes
        return len(blocks) if size >= max_split and blocks[at].size_bytes >= size + rounding else at

    def take_block(self, pool: Pool, size: int) -> Block:
        """A block of new memory, off the free list; at the limit, cached memory goes back first."""
        if self.collects_garbage:
            garbage_collect_cached_blocks(self)
        from_driver = segment_size(size, self.config.large_segment_size_bytes)
        block = self._alloc_block(pool, size, from_driver)
        self.met_limit = self.met_limit or block is None
        if block is None and release_available_cached_blocks(self, pool, size):
            block = self._alloc_block(pool, size, from_driver)
        if block is None:
            release_cached_blocks(self)
            self.num_alloc_retries += 1
            block = self._alloc_block(pool, size, from_driver)
        if block is None:
            self.num_ooms += 1
            limits = [n for n in (self.config.limit_bytes, self.config.capacity_bytes) if n is not None]
            raise OutOfMemory(from_driver, self.reserved_bytes, min(limits))
        return block

    def _ascending_address(self, size_bytes: int) -> int:
        address = self._next_address
        self._next_address += size_bytes
        return address

    def _alloc_block(self, pool: Pool, size: int, from_driver: int) -> Block | None:
        """`alloc_block`: the limit is held against the segment's size even where fewer pages would do."""
        limit = self.config.limit_bytes
        if limit is not None and self.reserved_bytes + from_driver > limit:
            return None
        if self.config.expandable_segments:
            return try_allocate_expandable_block(self, pool, size)
        if not self.device_can_give(from_driver):
            return None
        block = new_block(pool, self.new_segment_address(from_driver), from_driver, FREE)
        self.heads[block.address] = block
        self.reserve(SegmentEvent("segment_alloc", block.address, from_driver, pool.stream))
        return block


def _chain(head: Block) -> Iterator[Block]:
    block: Block | None = head
    while block is not None:
        yield block
        block = block.next
