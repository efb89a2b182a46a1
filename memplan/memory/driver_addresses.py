"""Where in the address space the CUDA driver puts a segment.

The caching allocator takes, of several free blocks of one size, the one at the lowest address, so that the driver's
choice decides which block is left over, and with it what is reserved and what is handed out whole. Seen in the
allocation traces of some 200 runs on an H200 (driver 580.159.04; the same distances in every process):

- the context leaves an arena of 414 MiB and a hole of 6 MiB below it, which are filled upwards;
- the kernels that the first forward pass loads take 64 to 78 MiB of that arena, the first backward some 10 MiB;
- after that, the driver reserves multiples of 32 MiB, each below the one before, and fills what a segment leaves of
  its reservation before it makes another, the newest first;
- a segment that is given back leaves a hole that is filled again.

The driver promises none of this; another process with other libraries has other gaps, and large runs forget them.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from memplan.memory.allocator_blocks import SegmentEvent
from memplan.units import MIB

ARENA_BYTES = 414 * MIB
LOW_HOLE_BYTES = 6 * MIB
KERNEL_BYTES = {"forward": 74 * MIB, "backward": 10 * MIB}
"""What loading kernels takes when a phase runs first: forward 74 MiB in full fine-tuning, 64 and 78 in other runs."""
RESERVATION_BYTES = 32 * MIB

_ARENA_AT = 1 << 46  # any number: only the order of addresses matters
_FREED = "segment_free"

Hole = tuple[int, int]
"""(address, bytes)"""


class DriverAddresses:
    """Hands out addresses as `CachingAllocator(new_segment_address=...)` asks for them."""

    def __init__(self) -> None:
        # Reservations, oldest first, each with its holes by ascending address.
        self._holes: list[list[Hole]] = [
            [(_ARENA_AT, ARENA_BYTES)],
            [(_ARENA_AT - LOW_HOLE_BYTES, LOW_HOLE_BYTES)],
        ]
        # Their numbers by the size of the largest hole, ascending: a full fine-tune takes thousands of segments.
        self._rooms = [ARENA_BYTES, LOW_HOLE_BYTES]
        self._by_room: dict[int, list[int]] = {ARENA_BYTES: [0], LOW_HOLE_BYTES: [1]}
        self._bottom = _ARENA_AT - 1024 * MIB
        self._owner: dict[int, int] = {}
        self._events: list[SegmentEvent] = []
        self._num_seen = 0
        self._to_load = dict(KERNEL_BYTES)

    def follow(self, events: list[SegmentEvent]) -> None:
        """Learns from the allocator's own list of driver calls which segments were given back."""
        self._events = events

    def load_kernels(self, phase: str) -> None:
        """`phase` begins: if it is the first of its kind, its kernels are loaded."""
        size_bytes = self._to_load.pop(phase, 0)
        if size_bytes:
            self.take(size_bytes)

    def take(self, size_bytes: int) -> int:
        """The address of a new segment."""
        self._take_back()
        number = max((numbers[-1] for room, numbers in self._by_room.items() if room >= size_bytes), default=-1)
        if number >= 0:
            holes = self._holes[number]
            index, address, room = next((i, at, room) for i, (at, room) in enumerate(holes) if room >= size_bytes)
            holes[index : index + 1] = [(address + size_bytes, room - size_bytes)] if room > size_bytes else []
            self._owner[address] = number
            self._sort_in(number)
            return address
        reserved = -(-size_bytes // RESERVATION_BYTES) * RESERVATION_BYTES
        self._bottom -= reserved
        rest = reserved - size_bytes
        number = len(self._holes)
        self._holes.append([(self._bottom + size_bytes, rest)] if rest else [])
        self._rooms.append(0)
        self._sort_in(number)
        self._owner[self._bottom] = number
        return self._bottom

    def _sort_in(self, number: int) -> None:
        """The holes of a reservation have changed."""
        before = self._rooms[number]
        largest = self._rooms[number] = max((room for _, room in self._holes[number]), default=0)
        if largest == before:
            return
        if before:
            numbers = self._by_room[before]
            del numbers[bisect_left(numbers, number)]
            if not numbers:
                del self._by_room[before]
        if largest:
            insort(self._by_room.setdefault(largest, []), number)

    def _take_back(self) -> None:
        for event in self._events[self._num_seen :]:
            number = self._owner.pop(event.address, None) if event.action == _FREED else None
            if number is not None:
                holes = self._holes[number]
                insort(holes, (event.address, event.size_bytes))
                _merge(holes)
                self._sort_in(number)
        self._num_seen = len(self._events)


def _merge(holes: list[Hole]) -> None:
    for index in range(len(holes) - 1, 0, -1):
        (before, room), (after, more) = holes[index - 1], holes[index]
        if before + room == after:
            holes[index - 1 : index + 1] = [(before, room + more)]
