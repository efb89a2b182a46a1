"""Where in the address space the CUDA driver puts a segment.

The caching allocator takes, of several free blocks of one size, the one at the lowest address, so that the driver's
choice decides which block is left over, and with it what is reserved and what is handed out whole. Seen in the
allocation traces of some 250 runs on H200 and H100 (drivers 580.159.04; the same distances in every process, those of
`tests/data/allocator` among them):

- the first segment lies above an arena of 414 MiB, which has a hole of 6 MiB below it and one of 22 MiB above;
- these are filled upwards, the hole below first, then the arena, then the hole above;
- kernels are loaded into the same holes when they are first called (`KERNELS`);
- after that, the driver reserves multiples of 32 MiB, each below the one before, but for the first of just 32 MiB,
  which lies above all else; it fills what a segment leaves of its reservation before it makes another, the newest
  first;
- a segment that is given back leaves a hole that is filled again.

The driver promises none of this; another process with other libraries has other gaps, and large runs forget them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from memplan.memory.allocator_blocks import SegmentEvent
from memplan.units import MIB

FIRST_SEGMENT_BYTES = 2 * MIB
ARENA_BYTES = 414 * MIB
LOW_HOLE_BYTES = 6 * MIB
TOP_HOLE_BYTES = 22 * MIB
RESERVATION_BYTES = 32 * MIB

ELEMENTWISE, PRODUCTS, ATTENTION, CUDNN, BACKWARD = "elementwise", "products", "attention", "cudnn", "backward"

KERNELS: dict[str, tuple[int, ...]] = {
    ELEMENTWISE: (10 * MIB,),
    PRODUCTS: (2 * MIB, 2 * MIB, 64 * MIB),
    ATTENTION: (2 * MIB,),
    CUDNN: (8 * MIB,),
    BACKWARD: (8 * MIB,),
}
"""What a library's kernels take where they are first called, piece by piece; what of them never lies in a hole (some
384 MiB with cuBLAS) concerns no segment. Whatever runs first loads `ELEMENTWISE` as well."""

_ARENA_AT = 1 << 46  # any number: only the order of addresses matters
_FIRST_AT = _ARENA_AT + ARENA_BYTES
_TOP_HOLE_AT = _FIRST_AT + 76 * MIB
_HIGHEST_AT = _FIRST_AT + 8909 * MIB
_FREED = "segment_free"

Hole = tuple[int, int]
"""(address, bytes)"""


class DriverAddresses:
    """Hands out addresses as `CachingAllocator(new_segment_address=...)` asks for them."""

    def __init__(self) -> None:
        # Reservations, oldest first, each with its holes by ascending address.
        self._holes: list[list[Hole]] = [
            [(_TOP_HOLE_AT, TOP_HOLE_BYTES)],
            [(_ARENA_AT, ARENA_BYTES)],
            [(_ARENA_AT - LOW_HOLE_BYTES, LOW_HOLE_BYTES)],
            [(_FIRST_AT, FIRST_SEGMENT_BYTES)],
        ]
        # Their numbers by the size of the largest hole, ascending: a full fine-tune takes thousands of segments.
        self._rooms = [holes[0][1] for holes in self._holes]
        self._by_room: dict[int, list[int]] = {room: [number] for number, room in enumerate(self._rooms)}
        self._bottom = _ARENA_AT - 1024 * MIB
        self._highest_is_free = True
        self._owner: dict[int, int] = {}
        self._events: list[SegmentEvent] = []
        self._num_seen = 0
        self._to_load = dict(KERNELS)

    def follow(self, events: list[SegmentEvent]) -> None:
        """Learns from the allocator's own list of driver calls which segments were given back."""
        self._events = events

    def load(self, kernels: Iterable[str]) -> None:
        """Kernels (keys of `KERNELS`) are called: those that are new are loaded."""
        for name in kernels:
            if name != ELEMENTWISE:
                self.load([ELEMENTWISE])
            for size_bytes in self._to_load.pop(name, ()):
                self._take_back()
                self._fill_hole(size_bytes)
                if name == PRODUCTS:
                    self._highest_is_free = False

    def take(self, size_bytes: int) -> int:
        """The address of a new segment."""
        self._take_back()
        found = self._fill_hole(size_bytes)
        if found is not None:
            return found
        reserved = -(-size_bytes // RESERVATION_BYTES) * RESERVATION_BYTES
        if reserved == RESERVATION_BYTES and self._highest_is_free:
            self._highest_is_free = False
            address = _HIGHEST_AT
        else:
            self._bottom -= reserved
            address = self._bottom
        rest = reserved - size_bytes
        number = len(self._holes)
        self._holes.append([(address + size_bytes, rest)] if rest else [])
        self._rooms.append(0)
        self._sort_in(number)
        self._owner[address] = number
        return address

    def _fill_hole(self, size_bytes: int) -> int | None:
        """The address in a hole, if one is large enough."""
        number = max((numbers[-1] for room, numbers in self._by_room.items() if room >= size_bytes), default=-1)
        if number < 0:
            return None
        holes = self._holes[number]
        index, address, room = next((i, at, room) for i, (at, room) in enumerate(holes) if room >= size_bytes)
        holes[index : index + 1] = [(address + size_bytes, room - size_bytes)] if room > size_bytes else []
        self._owner[address] = number
        self._sort_in(number)
        return address

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
