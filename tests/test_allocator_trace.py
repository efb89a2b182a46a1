"""Recorded allocation histories against the model; these are worked out by hand, in torch's format."""

from __future__ import annotations

import re

import pytest

from memplan.errors import MemplanError
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.allocator_trace import replay_trace
from memplan.units import MIB

LOW, HIGH = 0x7F0000000000, 0x7F8000000000


def entry(action: str, address: int, size: int) -> dict[str, object]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "frames": []}


def freed(address: int, size: int) -> list[dict[str, object]]:
    return [entry("free_requested", address, size), entry("free_completed", address, size)]


# The driver's second large segment lies below the first, so that it wins ties.
HISTORY = [
    entry("segment_alloc", HIGH, 20 * MIB),
    entry("alloc", HIGH, 4 * MIB),
    entry("alloc", HIGH + 4 * MIB, 6 * MIB - 100),
    *freed(HIGH, 4 * MIB),
    entry("alloc", HIGH, 3 * MIB),  # takes the 4 MiB whole: 1 MiB is not split off
    entry("alloc", HIGH + 10 * MIB, 10 * MIB),
    entry("segment_alloc", LOW, 20 * MIB),
    entry("alloc", LOW, 5 * MIB),
    *freed(HIGH, 3 * MIB),
    *freed(HIGH + 4 * MIB, 6 * MIB - 100),
    *freed(HIGH + 10 * MIB, 10 * MIB),
    *freed(LOW, 5 * MIB),
    entry("alloc", LOW, 2 * MIB),  # of two free blocks of 20 MiB
    entry("segment_free", HIGH, 20 * MIB),  # empty_cache
    entry("snapshot", 0, 0),
    entry("segment_alloc", HIGH, 32 * MIB),
    entry("alloc", HIGH, 31 * MIB),
]


def test_a_recorded_history_is_followed_to_the_address() -> None:
    result = replay_trace(HISTORY)
    assert result.difference is None
    assert (result.num_allocs, result.num_segment_events) == (7, 4)
    assert result.peak_reserved_bytes == result.recorded_peak_reserved_bytes == 52 * MIB


def test_own_addresses_still_give_the_recorded_driver_calls() -> None:
    assert replay_trace(HISTORY[:9], follow_addresses=False).difference is None
    # with ascending addresses the first segment wins the tie, and the other one can be given back
    parted = replay_trace(HISTORY, follow_addresses=False)
    assert parted.difference is None
    assert parted.peak_reserved_bytes == 52 * MIB


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, {"addr": HIGH + 512}, "recorded at"),
        (0, {"size": 22 * MIB}, "driver call 0"),
        (5, {"size": 5 * MIB}, "recorded at"),
        (7, {"action": "snapshot"}, "recorded none"),
        (6, {"action": "oom"}, "recorded out of memory"),
    ],
)
def test_a_history_the_rules_do_not_give_is_told(index: int, change: dict[str, object], message: str) -> None:
    history = [*HISTORY[:index], {**HISTORY[index], **change}, *HISTORY[index + 1 :]]
    difference = replay_trace(history).difference
    assert difference is not None
    assert re.search(message, difference)


def test_a_retry_at_the_limit_is_found_by_the_model() -> None:
    history = [
        entry("segment_alloc", HIGH, 20 * MIB),
        entry("alloc", HIGH, 20 * MIB),
        *freed(HIGH, 20 * MIB),
        entry("segment_free", HIGH, 20 * MIB),
        entry("segment_alloc", LOW, 30 * MIB),
        entry("alloc", LOW, 30 * MIB),
        entry("oom", 0, 12 * MIB),
    ]
    assert replay_trace(history, AllocatorConfig(limit_bytes=40 * MIB)).difference is None
    tighter = replay_trace(history, AllocatorConfig(limit_bytes=60 * MIB)).difference
    assert tighter is not None


def test_an_expandable_history() -> None:
    history = [
        entry("segment_map", HIGH, 20 * MIB),
        entry("alloc", HIGH, 3 * MIB),
        entry("segment_map", HIGH + 20 * MIB, 20 * MIB),
        entry("alloc", HIGH + 3 * MIB, 30 * MIB),
        *freed(HIGH + 3 * MIB, 30 * MIB),
        entry("segment_unmap", HIGH + 20 * MIB, 20 * MIB),
        entry("snapshot", 0, 0),
    ]
    assert replay_trace(history, AllocatorConfig(expandable_segments=True)).difference is None
    assert replay_trace(history).difference is not None


def test_a_history_that_starts_late_is_refused() -> None:
    with pytest.raises(MemplanError, match="without allocating"):
        replay_trace(freed(HIGH, 512))
    with pytest.raises(MemplanError, match="not an action"):
        replay_trace([entry("allocate", HIGH, 512)])
