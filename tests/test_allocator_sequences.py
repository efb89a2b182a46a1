"""The caching allocator on any sequence of requests: held against a plain model, and against itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.memory.allocator import CachingAllocator, OutOfMemory
from memplan.memory.allocator_blocks import FREE, UNMAPPED, Block
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.allocator_replay import Slots, repeat, replay
from memplan.memory.allocator_sizes import round_size, segment_size
from memplan.units import MIB

EXPANDABLE = AllocatorConfig(expandable_segments=True)

SIZES = st.one_of(
    st.integers(1, 2 * MIB),
    st.integers(MIB, 12 * MIB),
    st.integers(10 * MIB, 50 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 3 * MIB, 8 * MIB, 20 * MIB, 40 * MIB]),
)
# (bytes to ask for, which live block to free before, if any)
STEPS = st.lists(st.tuples(SIZES, st.integers(0, 40), st.sampled_from([0, 0, 0, 5])), max_size=60)
CONFIGS = st.sampled_from(
    [
        AllocatorConfig(),
        AllocatorConfig(limit_bytes=150 * MIB),
        AllocatorConfig(max_split_size_bytes=20 * MIB, limit_bytes=150 * MIB),
        AllocatorConfig(max_split_size_bytes=30 * MIB, roundup_power2_divisions=(0, 2, *[4] * 14)),
        AllocatorConfig(garbage_collection_threshold=0.3, limit_bytes=200 * MIB),
    ]
)
EXPANDABLE_CONFIGS = st.sampled_from(
    [
        EXPANDABLE,
        AllocatorConfig(expandable_segments=True, capacity_bytes=160 * MIB),
        AllocatorConfig(expandable_segments=True, limit_bytes=150 * MIB, garbage_collection_threshold=0.5),
    ]
)


def check(allocator: CachingAllocator) -> None:
    """Every byte of a segment is in one block, and every free block is on its list, merged and in order."""
    free: dict[int, Block] = {}
    allocated = reserved = requested = 0
    for head in allocator.heads.values():
        assert head.prev is None
        block: Block | None = head
        while block is not None:
            assert block.size_bytes > 0
            assert block.size_bytes % 512 == 0
            following = block.next
            if following is not None:
                assert following.prev is block
                assert following.address == block.address + block.size_bytes
                assert block.state not in (FREE, UNMAPPED) or following.state != block.state
            if block.state == FREE:
                free[block.address] = block
            elif block.state != UNMAPPED:
                allocated += block.size_bytes
                requested += block.requested_bytes
                assert block.requested_bytes <= block.size_bytes
            reserved += 0 if block.state == UNMAPPED else block.size_bytes
            block = following
    on_lists = [block for pool in allocator.pools() for block in pool.blocks]
    assert {block.address: block for block in on_lists} == free
    for pool in allocator.pools():
        assert [(b.size_bytes, b.address) for b in pool.blocks] == sorted(
            (b.size_bytes, b.address) for b in pool.blocks
        )
        assert pool.keys == [b.key for b in pool.blocks]
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)
    assert allocator.requested_bytes == requested
    assert requested <= allocated <= reserved
    assert allocator.peak_allocated_bytes >= allocated
    assert allocator.peak_reserved_bytes >= reserved
    assert reserved == sum(segment.size_bytes for segment in allocator.segments())


@dataclass
class Part:
    """A block of the plain model: `segment` tells which blocks may merge."""

    segment: int
    stream: int
    small: bool
    address: int
    size: int
    used: bool = False
    freed_at: int = 0


class PlainAllocator:
    """The same rules over one list, every choice a scan: slow, and with nothing to keep in step."""

    def __init__(self, config: AllocatorConfig) -> None:
        self.config = config
        self.max_split = config.max_split_size_bytes or 1 << 60
        self.parts: list[Part] = []
        self.top = self.lookups = 0

    @property
    def reserved(self) -> int:
        return sum(part.size for part in self.parts)

    def whole(self, part: Part) -> bool:
        return sum(other.segment == part.segment for other in self.parts) == 1

    def idle(self, stream: int, *, small: bool) -> list[Part]:
        found = [p for p in self.parts if not p.used and (p.stream, p.small) == (stream, small)]
        return sorted(found, key=lambda p: (p.size, p.address))

    def malloc(self, num_bytes: int, stream: int) -> Part:
        size = round_size(num_bytes, self.config.roundup_power2_divisions)
        small = size <= MIB
        self.lookups += not small
        fitting = [p for p in self.idle(stream, small=small) if p.size >= size]
        best = fitting[0] if fitting else None
        if best and size < self.max_split <= best.size:
            best = None
        if best and size >= self.max_split and best.size >= size + 20 * MIB:
            best = None
        part = best or self.grow(size, stream, small=small)
        rest = part.size - size
        if rest >= 512 if small else (rest > MIB and size < self.max_split):
            at = self.parts.index(part) + 1
            cut = Part(part.segment, stream, small, part.address + size, rest, freed_at=self.lookups)
            self.parts.insert(at, cut)
            part.size = size
        part.used = True
        return part

    def free(self, part: Part) -> None:
        part.used, part.freed_at = False, self.lookups
        at = self.parts.index(part)
        for other in [*self.parts[at + 1 : at + 2], *self.parts[max(at - 1, 0) : at]]:
            if not other.used and other.segment == part.segment:
                part.address = min(part.address, other.address)
                part.size += other.size
                self.parts.remove(other)

    def grow(self, size: int, stream: int, *, small: bool) -> Part:
        limit = self.config.limit_bytes or 1 << 60
        self.collect(limit)
        wanted = segment_size(size)
        fits = self.reserved + wanted <= limit
        if not fits and self.max_split < 1 << 60:
            enough = self.make_room(max(size, self.max_split), self.idle(stream, small=small))
            fits = enough and self.reserved + wanted <= limit
        if not fits:
            self.parts = [p for p in self.parts if p.used or not self.whole(p)]
            if self.reserved + wanted > limit:
                raise OutOfMemory(wanted, self.reserved, limit)
        part = Part(self.top, stream, small, self.top, wanted)
        self.top += wanted
        self.parts.append(part)
        return part

    def make_room(self, wanted: int, idle: list[Part]) -> bool:
        enough = [p for p in idle if p.size >= wanted]
        if enough:
            self.parts.remove(enough[0])
            return True
        released = 0
        for part in reversed(idle):
            if released < wanted and part.size >= self.max_split:
                released += part.size
                self.parts.remove(part)
        return released >= wanted

    def collect(self, limit: int) -> None:
        threshold = int(self.config.garbage_collection_threshold * limit)
        old = [p for p in self.parts if not p.used and not p.small and self.whole(p)]
        target, reclaimed, went = self.reserved - threshold, 0, True
        while threshold and reclaimed < target and old and went:
            mean = sum(self.lookups - p.freed_at for p in old) / len(old)
            gone = [p for p in old if self.lookups - p.freed_at >= mean]
            went = bool(gone)
            for part in gone:
                reclaimed += part.size
                old.remove(part)
                self.parts.remove(part)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, config=CONFIGS)
def test_the_lists_choose_as_a_scan_does(steps: list[tuple[int, int, int]], config: AllocatorConfig) -> None:
    allocator, plain = CachingAllocator(config), PlainAllocator(config)
    live: list[tuple[Block, Part]] = []
    for num_bytes, pick, stream in steps:
        if pick < len(live):
            block, part = live.pop(pick)
            allocator.free(block)
            plain.free(part)
        try:
            part = plain.malloc(num_bytes, stream)
        except OutOfMemory:
            with pytest.raises(OutOfMemory):
                allocator.malloc(num_bytes, stream)
        else:
            block = allocator.malloc(num_bytes, stream)
            assert (block.address, block.size_bytes) == (part.address, part.size)
            live.append((block, part))
        assert allocator.reserved_bytes == plain.reserved
        assert allocator.allocated_bytes == sum(part.size for part in plain.parts if part.used)
    check(allocator)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, config=st.one_of(CONFIGS, EXPANDABLE_CONFIGS), empties=st.booleans())
def test_nothing_is_lost_and_all_that_is_freed_merges(
    steps: list[tuple[int, int, int]], config: AllocatorConfig, empties: bool
) -> None:
    allocator = CachingAllocator(config)
    live: list[Block] = []
    for num_bytes, pick, stream in steps:
        if pick < len(live):
            allocator.free(live.pop(pick))
        try:
            live.append(allocator.malloc(num_bytes, stream))
        except OutOfMemory:
            check(allocator)
        if empties and pick == 40:
            allocator.empty_cache()
    check(allocator)
    for block in live:
        allocator.free(block)
    check(allocator)
    assert allocator.allocated_bytes == allocator.requested_bytes == 0
    assert all(len(segment.blocks) == 1 for segment in allocator.segments())
    allocator.empty_cache()
    check(allocator)
    assert allocator.reserved_bytes == 0 or config.expandable_segments is False
    assert allocator.segments() == []


TAPES = st.lists(st.tuples(SIZES, st.integers(0, 30)), min_size=1, max_size=30)


def tape_of(steps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A tape that frees all it allocates, some of it on the way."""
    tape: list[tuple[int, int]] = []
    live: list[int] = []
    for slot, (num_bytes, pick) in enumerate(steps):
        if pick < len(live):
            tape.append((live.pop(pick), 0))
        tape.append((slot, num_bytes))
        live.append(slot)
    return tape + [(slot, 0) for slot in live]


def test_replay_plays_slots() -> None:
    allocator, slots = CachingAllocator(), Slots([None, None])
    replay(allocator, [(0, 1000), (1, 3 * MIB), (0, 0)], slots)
    assert slots[0] is None
    assert allocator.allocated_bytes == 3 * MIB
    replay(allocator, [(1, 0)], slots)
    assert allocator.allocated_bytes == 0


@settings(max_examples=50, deadline=None)
@given(steps=TAPES, config=st.one_of(CONFIGS, EXPANDABLE_CONFIGS), num_times=st.integers(0, 7))
def test_repeat_ends_where_replaying_does(
    steps: list[tuple[int, int]], config: AllocatorConfig, num_times: int
) -> None:
    config = replace(config, limit_bytes=None, capacity_bytes=None)
    tape = tape_of(steps)
    one, other = CachingAllocator(config), CachingAllocator(config)
    slots: Slots = [None] * len(steps)
    others: Slots = [None] * len(steps)
    for allocator in (one, other):
        allocator.malloc(3 * MIB)
        allocator.malloc(700)
    assert repeat(one, tape, num_times, slots) <= num_times
    for _ in range(num_times):
        replay(other, tape, others)
    assert one.segments() == other.segments()
    assert one.peak_allocated_bytes == other.peak_allocated_bytes
    assert one.peak_reserved_bytes == other.peak_reserved_bytes


def test_repeat_skips_what_repeats() -> None:
    # the first play makes the segment; the second finds and leaves memory as all later ones would
    assert repeat(CachingAllocator(), [(0, 30 * MIB), (0, 0)], 1000, [None]) == 2
