"""The order of segments in the address space, against a recorded run."""

from __future__ import annotations

from memplan.memory.allocator_blocks import SegmentEvent
from memplan.memory.driver_addresses import DriverAddresses
from memplan.units import MIB

# Segments of a full fine-tuning run on an H200 (three layers, hidden size 1024) above its low hole: MiB, and MiB from
# the address of the first one. A name says where that phase first begins.
RECORDED: list[tuple[int, int] | str] = [
    (16, -414), (20, -398), (20, -378), (20, -358), (20, -338), (16, -318), "forward",
    (32, -228), (2, -194), (20, -192), (2, -172), "backward", (20, -162), (20, -142), (20, -122), (20, -102), (2, -82),
    (20, -80), (20, -60), (16, -40), (32, -1438), (32, -1470), (32, -1502),
]  # fmt: skip
LOW_HOLE_MIB = 6


def _order(addresses: list[int]) -> list[int]:
    return sorted(range(len(addresses)), key=addresses.__getitem__)


def test_segments_lie_in_the_order_of_a_recorded_run() -> None:
    driver = DriverAddresses()
    driver.take(LOW_HOLE_MIB * MIB)
    made, recorded = [], []
    for row in RECORDED:
        if isinstance(row, str):
            driver.load_kernels(row)
            continue
        size, address = row
        made.append(driver.take(size * MIB))
        recorded.append(address)
    assert _order(made) == _order(recorded)


def test_segments_do_not_overlap_and_what_is_given_back_is_used_again() -> None:
    driver = DriverAddresses()
    events: list[SegmentEvent] = []
    driver.follow(events)
    held: dict[int, int] = {}
    for number in range(200):
        size = (2, 20, 34, 86, 400)[number % 5] * MIB
        address = driver.take(size)
        assert all(a + s <= address or address + size <= a for a, s in held.items())
        held[address] = size
        if number % 3 == 0:
            gone = min(held)
            events.append(SegmentEvent("segment_free", gone, held.pop(gone), 0))
    lowest = min(held)
    events.append(SegmentEvent("segment_free", lowest, held[lowest], 0))
    assert driver.take(held[lowest]) == lowest
