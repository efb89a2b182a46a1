"""The caching allocator, rule by rule: expected by hand from `c10/cuda/CUDACachingAllocator.cpp`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memplan.memory.allocator import CachingAllocator, OutOfMemory
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.allocator_sizes import round_size, segment_size
from memplan.units import MIB

EXPANDABLE = AllocatorConfig(expandable_segments=True)


def events(allocator: CachingAllocator) -> list[tuple[str, int]]:
    return [(event.action, event.size_bytes // MIB) for event in allocator.segment_events]


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "block"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)],
)
def test_round_size(requested: int, block: int) -> None:
    assert round_size(requested) == block
    assert CachingAllocator().malloc(requested).size_bytes == block


@pytest.mark.parametrize(
    ("requested", "divisions", "block"),
    [
        # 84 MiB lies between 64 and 128: torch's own test_allocator_settings rounds it to 64 + 2 * 64 / 4
        (84 * MIB, 4, 96 * MIB),
        (400 * MIB, 8, 416 * MIB),  # between 256 and 512 in steps of 32
        (64 * MIB, 4, 64 * MIB),  # a power of two stays
        (1200, 4, 1536),  # not above 512 B a division
        (2049, 4, 2560),
        (84 * MIB, 1, 84 * MIB),  # divisions > 1
    ],
)
def test_round_size_to_divisions(requested: int, divisions: int, block: int) -> None:
    config = AllocatorConfig(roundup_power2_divisions=(divisions,) * 16)
    assert round_size(requested, config.roundup_power2_divisions) == block
    assert CachingAllocator(config).malloc(requested).size_bytes >= block


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (131 * MIB, 132 * MIB),
    ],
)
def test_segment_size(block: int, segment: int) -> None:
    assert segment_size(block) == segment
    allocator = CachingAllocator()
    allocator.malloc(block)
    assert allocator.reserved_bytes == segment


# --- split, best fit, merge --------------------------------------------------------------------------------


@pytest.mark.parametrize("requested", [11 * MIB, 11 * MIB - 1, 12 * MIB - 1])
def test_a_rest_of_a_mebibyte_is_not_split_off(requested: int) -> None:
    allocator = CachingAllocator()
    allocator.malloc(requested)
    assert (allocator.allocated_bytes, allocator.requested_bytes) == (12 * MIB, requested)


def test_a_larger_rest_is_split_off() -> None:
    allocator = CachingAllocator()
    allocator.malloc(11 * MIB - 512)
    assert allocator.allocated_bytes == 11 * MIB - 512
    assert [b.size_bytes for b in allocator.segments()[0].blocks] == [11 * MIB - 512, MIB + 512]


def test_a_small_rest_is_split_off_in_the_small_pool() -> None:
    allocator = CachingAllocator()
    allocator.malloc(MIB)
    allocator.malloc(MIB - 512)
    assert [b.size_bytes for b in allocator.segments()[0].blocks] == [MIB, MIB - 512, 512]


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(n * MIB) for n in (40, 30, 20)]
    for block in blocks:
        allocator.free(block)
    assert allocator.malloc(25 * MIB).address == blocks[1].address
    assert allocator.malloc(25 * MIB).address == blocks[0].address
    assert allocator.malloc(14 * MIB).address == blocks[0].address + 25 * MIB  # 15 are left of the 40


def test_of_equal_blocks_the_lowest_address_is_taken() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(20 * MIB) for _ in range(3)]
    addresses = [block.address for block in blocks]
    for block in (blocks[2], blocks[0], blocks[1]):
        allocator.free(block)
    assert [allocator.malloc(20 * MIB).address for _ in range(3)] == addresses


def test_descending_addresses_turn_ties_around() -> None:
    bases = iter((90 * MIB, 60 * MIB, 30 * MIB))
    allocator = CachingAllocator(new_segment_address=lambda size_bytes: next(bases))
    for block in [allocator.malloc(20 * MIB) for _ in range(3)]:
        allocator.free(block)
    assert allocator.malloc(20 * MIB).address == 30 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_merge(order: tuple[int, ...]) -> None:
    allocator = CachingAllocator()
    blocks = [allocator.malloc(3 * MIB) for _ in range(3)]
    for index in order:
        allocator.free(blocks[index])
    (segment,) = allocator.segments()
    assert [(b.size_bytes, b.state) for b in segment.blocks] == [(20 * MIB, "free")]


def test_large_requests_take_no_small_blocks() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(512))
    allocator.malloc(MIB + 512)
    assert events(allocator) == [("segment_alloc", 2), ("segment_alloc", 20)]


def test_streams_share_nothing() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(20 * MIB, stream=0))
    allocator.malloc(20 * MIB, stream=7)
    allocator.malloc(20 * MIB, stream=0)
    states = [(segment.stream, segment.blocks[0].state) for segment in allocator.segments()]
    assert states == [(0, "allocated"), (7, "allocated")]


def test_peaks_and_their_reset() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(30 * MIB))
    assert (allocator.allocated_bytes, allocator.peak_allocated_bytes) == (0, 30 * MIB)
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.peak_reserved_bytes) == (0, 30 * MIB)
    allocator.reset_peak()
    assert (allocator.peak_allocated_bytes, allocator.peak_reserved_bytes) == (0, 0)


def test_empty_cache_keeps_segments_in_use() -> None:
    allocator = CachingAllocator()
    kept, gone = allocator.malloc(4 * MIB), allocator.malloc(20 * MIB)
    allocator.free(gone)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB
    allocator.free(kept)
    allocator.empty_cache()
    assert allocator.segments() == []


# --- limits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [AllocatorConfig(limit_bytes=50 * MIB), AllocatorConfig(capacity_bytes=50 * MIB)])
def test_cached_memory_goes_back_before_the_limit_stops_a_request(config: AllocatorConfig) -> None:
    allocator = CachingAllocator(config)
    first, _ = allocator.malloc(20 * MIB), allocator.malloc(20 * MIB)
    allocator.free(first)
    allocator.malloc(30 * MIB)  # 40 + 30 > 50; 20 + 30 is not
    assert events(allocator)[2:] == [("segment_free", 20), ("segment_alloc", 30)]
    assert (allocator.num_alloc_retries, allocator.num_ooms) == (1, 0)
    with pytest.raises(OutOfMemory) as caught:
        allocator.malloc(1)
    assert (caught.value.requested_bytes, caught.value.reserved_bytes) == (2 * MIB, 50 * MIB)
    assert caught.value.limit_bytes == 50 * MIB
    assert (allocator.num_alloc_retries, allocator.num_ooms) == (2, 1)


def test_a_segment_in_use_cannot_go_back() -> None:
    allocator = CachingAllocator(AllocatorConfig(limit_bytes=40 * MIB))
    allocator.malloc(2 * MIB)  # of 20 MiB
    with pytest.raises(OutOfMemory):
        allocator.malloc(22 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_old_blocks_are_collected_over_the_threshold() -> None:
    config = AllocatorConfig(limit_bytes=200 * MIB, garbage_collection_threshold=0.25)
    allocator = CachingAllocator(config)
    first, second = allocator.malloc(20 * MIB), allocator.malloc(20 * MIB)
    allocator.free(first)  # after two lookups
    allocator.malloc(30 * MIB, stream=1)  # 40 MiB reserved: below the threshold of 50
    allocator.free(second)  # after three
    allocator.malloc(32 * MIB)  # 70 MiB reserved; ages 2 and 1, mean 1.5: the first goes, and 20 is enough
    assert events(allocator)[3:] == [("segment_free", 20), ("segment_alloc", 32)]
    assert allocator.segment_events[3].address == first.address
    assert allocator.reserved_bytes == 82 * MIB


def test_a_threshold_without_a_limit_collects_nothing() -> None:
    allocator = CachingAllocator(AllocatorConfig(garbage_collection_threshold=0.01, capacity_bytes=80 * MIB))
    allocator.free(allocator.malloc(20 * MIB))
    allocator.malloc(30 * MIB)
    assert allocator.reserved_bytes == 50 * MIB


# --- max_split_size ----------------------------------------------------------------------------------------

MAX_SPLIT = AllocatorConfig(max_split_size_bytes=20 * MIB, limit_bytes=100 * MIB)


def test_oversize_blocks_are_neither_split_nor_given_to_small_requests() -> None:
    allocator = CachingAllocator(MAX_SPLIT)
    oversize = allocator.malloc(40 * MIB)
    allocator.free(oversize)
    allocator.malloc(8 * MIB)  # below max_split_size: not from 40
    assert events(allocator) == [("segment_alloc", 40), ("segment_alloc", 20)]
    assert allocator.malloc(21 * MIB).size_bytes == 40 * MIB  # 40 < 21 + 20, and handed out whole
    assert allocator.allocated_bytes == 48 * MIB


def test_an_oversize_block_is_not_used_for_a_much_smaller_request() -> None:
    allocator = CachingAllocator(replace(MAX_SPLIT, limit_bytes=None))
    allocator.free(allocator.malloc(40 * MIB))
    allocator.malloc(20 * MIB)  # 40 >= 20 + 20
    assert events(allocator) == [("segment_alloc", 40), ("segment_alloc", 20)]


def test_max_non_split_rounding() -> None:
    config = AllocatorConfig(max_split_size_bytes=20 * MIB, max_non_split_rounding_bytes=30 * MIB)
    allocator = CachingAllocator(config)
    allocator.free(allocator.malloc(40 * MIB))
    assert allocator.malloc(20 * MIB).size_bytes == 40 * MIB


def test_one_oversize_block_goes_back_if_it_is_enough() -> None:
    allocator = CachingAllocator(replace(MAX_SPLIT, limit_bytes=70 * MIB))
    blocks = [allocator.malloc(n * MIB) for n in (20, 40)]
    for block in blocks:
        allocator.free(block)
    allocator.malloc(45 * MIB)  # none of 45: from the largest on until 45 are free
    assert events(allocator)[2:] == [("segment_free", 40), ("segment_free", 20), ("segment_alloc", 46)]
    assert allocator.num_alloc_retries == 0


def test_the_next_larger_oversize_block_goes_back_alone() -> None:
    allocator = CachingAllocator(replace(MAX_SPLIT, limit_bytes=90 * MIB))
    blocks = [allocator.malloc(n * MIB) for n in (42, 44)]
    for block in blocks:
        allocator.free(block)
    allocator.malloc(22 * MIB)  # 42 >= 22 + 20: not for this request, but large enough to make room
    assert events(allocator)[2:] == [("segment_free", 42), ("segment_alloc", 22)]


def test_not_enough_oversize_blocks_lead_to_the_full_retry() -> None:
    allocator = CachingAllocator(MAX_SPLIT)
    allocator.free(allocator.malloc(40 * MIB))
    allocator.malloc(8 * MIB)
    allocator.malloc(50 * MIB)
    assert events(allocator)[2:] == [("segment_free", 40), ("segment_alloc", 50)]
    assert allocator.num_alloc_retries == 1


# --- expandable segments -----------------------------------------------------------------------------------


def test_expandable_segments_grow_by_pages() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    first = allocator.malloc(3 * MIB)
    second = allocator.malloc(30 * MIB)  # 17 MiB are free at the end: 13 more take a page
    third = allocator.malloc(7 * MIB)
    allocator.malloc(600)
    assert events(allocator) == [("segment_map", 20), ("segment_map", 20), ("segment_map", 2)]
    assert (second.address, third.address) == (first.address + 3 * MIB, first.address + 33 * MIB)
    large, small = allocator.segments()
    assert (large.size_bytes, large.is_large) == (40 * MIB, True)
    assert (small.size_bytes, small.is_large) == (2 * MIB, False)


def test_expandable_segments_split_to_512_bytes() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    allocator.malloc(20 * MIB - 512)
    assert [b.size_bytes for b in allocator.segments()[0].blocks] == [20 * MIB - 512, 512]


def test_the_end_of_an_expandable_segment_is_the_last_resort() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    first, _ = allocator.malloc(10 * MIB), allocator.malloc(3 * MIB)
    allocator.free(first)  # 10 MiB free at the start, 7 at the end, which could grow
    assert allocator.malloc(6 * MIB).address == first.address


def test_emptying_unmaps_whole_pages_and_mapping_fills_the_gap() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    first, second = allocator.malloc(30 * MIB), allocator.malloc(5 * MIB)  # at 0 and 30 of 40
    base = first.address
    allocator.free(first)
    allocator.empty_cache()  # of 0…30 only 0…20 is a page
    assert events(allocator)[1:] == [("segment_unmap", 20)]
    (segment,) = allocator.segments()
    assert [(b.address - base, b.size_bytes // MIB) for b in segment.blocks] == [
        (20 * MIB, 10),
        (30 * MIB, 5),
        (35 * MIB, 5),
    ]
    assert allocator.malloc(12 * MIB).address == base
    assert allocator.reserved_bytes == 40 * MIB
    allocator.free(second)


def test_an_empty_expandable_segment_is_dropped() -> None:
    allocator = CachingAllocator(EXPANDABLE)
    allocator.free(allocator.malloc(45 * MIB))
    allocator.empty_cache()
    assert (allocator.reserved_bytes, allocator.segments(), allocator.heads) == (0, [], {})
    allocator.malloc(MIB)


def test_the_limit_counts_the_request_but_the_device_counts_pages() -> None:
    within = CachingAllocator(AllocatorConfig(expandable_segments=True, limit_bytes=30 * MIB))
    within.malloc(21 * MIB)  # 22 MiB are held against the limit, 40 are mapped
    assert within.reserved_bytes == 40 * MIB
    beyond = CachingAllocator(AllocatorConfig(expandable_segments=True, capacity_bytes=30 * MIB))
    with pytest.raises(OutOfMemory):
        beyond.malloc(21 * MIB)
