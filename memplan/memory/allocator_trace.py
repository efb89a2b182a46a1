"""Play a recorded allocation history through the model, and say where the two part.

`torch.cuda.memory._record_memory_history()` starts recording, and `torch.cuda.memory._snapshot()` holds the
history under `device_traces[device]`. Start before the first CUDA allocation: the model starts empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from memplan.errors import MemplanError
from memplan.memory.allocator import CachingAllocator, OutOfMemory
from memplan.memory.allocator_blocks import Block, SegmentAction, SegmentEvent
from memplan.memory.allocator_config import AllocatorConfig

_SEGMENT_ACTIONS = get_args(SegmentAction)
_GIVES_BACK = ("segment_free", "segment_unmap")


@dataclass(frozen=True, slots=True)
class TraceComparison:
    """What the replay of a history gave; `difference` is None if it made the recorded calls to the driver."""

    num_allocs: int
    num_segment_events: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    recorded_peak_reserved_bytes: int
    difference: str | None


class _Parted(Exception):
    pass


def replay_trace(
    entries: Sequence[Mapping[str, Any]],
    config: AllocatorConfig | None = None,
    *,
    follow_addresses: bool = True,
) -> TraceComparison:
    """Replay `entries` (`action`, `size` in bytes, `addr`, `stream`; other keys are ignored).

    With `follow_addresses` the model's segments get the recorded addresses, so that ties between free blocks
    fall as they did: then each block must lie where it was recorded, and the replay stops at the first that
    does not. Without, only the sequence of driver calls (action, size, stream) is compared, to the end: this
    also tests how the model numbers its addresses.

    Memory given back in the trace is taken for `empty_cache`, unless `config` has a limit and the driver is
    asked for more right after: then the model has to find that out itself.

    Raises:
        MemplanError: an action torch does not record, or a free of memory that the trace did not allocate.
    """
    return _Replay(entries, config or AllocatorConfig(), follow_addresses=follow_addresses).run()


class _Replay:
    def __init__(
        self, entries: Sequence[Mapping[str, Any]], config: AllocatorConfig, *, follow_addresses: bool
    ) -> None:
        self.entries = entries
        self.follow = follow_addresses
        self.recorded = [
            SegmentEvent(entry["action"], entry["addr"], entry["size"], entry.get("stream", 0))
            for entry in entries
            if entry["action"] in _SEGMENT_ACTIONS
        ]
        self.has_limit = config.limit_bytes is not None or config.capacity_bytes is not None
        self.allocator = CachingAllocator(
            config, new_segment_address=self.recorded_address if follow_addresses else None
        )
        self.live: dict[int, Block] = {}
        self.num_allocs = 0
        self.num_passed = 0  # recorded driver calls up to the current entry
        self.num_checked = 0
        self.difference: str | None = None

    def run(self) -> TraceComparison:
        for index, entry in enumerate(self.entries):
            try:
                self.step(index, entry)
            except OutOfMemory:  # nothing after it can be followed
                self.difference = self.difference or f"entry {index}: out of memory, recorded none"
                break
            except _Parted as parted:
                self.difference = self.difference or f"entry {index}: {parted}"
                if self.follow:
                    break
        num_made = len(self.allocator.segment_events)
        if self.difference is None and num_made != len(self.recorded):
            self.difference = f"end: {num_made} driver calls, recorded {len(self.recorded)}"
        reserved = recorded_peak = 0
        for event in self.recorded:
            reserved += -event.size_bytes if event.action in _GIVES_BACK else event.size_bytes
            recorded_peak = max(recorded_peak, reserved)
        return TraceComparison(
            num_allocs=self.num_allocs,
            num_segment_events=num_made,
            peak_allocated_bytes=self.allocator.peak_allocated_bytes,
            peak_reserved_bytes=self.allocator.peak_reserved_bytes,
            recorded_peak_reserved_bytes=recorded_peak,
            difference=self.difference,
        )

    def step(self, index: int, entry: Mapping[str, Any]) -> None:
        action, address, size = entry["action"], entry.get("addr", 0), entry.get("size", 0)
        if action in _SEGMENT_ACTIONS:
            self.num_passed += 1
            if self.is_empty_cache(index):
                self.allocator.empty_cache()
        elif action == "alloc":
            block = self.allocator.malloc(size, entry.get("stream", 0))
            self.live[address] = block
            self.num_allocs += 1
            self.check_driver_calls()
            if self.follow and block.address != address:
                raise _Parted(f"block of {size} B at {block.address}, recorded at {address}")
        elif action == "free_completed":
            if address not in self.live:
                raise MemplanError(
                    f"the trace frees {address} without allocating it",
                    hints=["start recording before the first CUDA allocation, with room for every entry"],
                )
            self.allocator.free(self.live.pop(address))
        elif action == "oom":
            self.check_oom(size, entry.get("stream", 0))
        elif action not in ("free_requested", "snapshot"):
            raise MemplanError(f"`{action}` is not an action of a memory history")

    def is_empty_cache(self, index: int) -> bool:
        """Whether the entry begins a run of memory given back that no allocation brought about."""
        if self.entries[index]["action"] not in _GIVES_BACK:
            return False
        if index and self.entries[index - 1]["action"] in _GIVES_BACK:
            return False
        if not self.has_limit:
            return True
        following = (e["action"] for e in self.entries[index:] if e["action"] not in _GIVES_BACK)
        return next(following, "snapshot") not in ("segment_alloc", "segment_map", "oom")

    def check_oom(self, size: int, stream: int) -> None:
        try:
            block = self.allocator.malloc(size, stream)
        except OutOfMemory:
            return
        self.allocator.free(block)
        raise _Parted(f"{size} B fitted, recorded out of memory")

    def check_driver_calls(self) -> None:
        """Hold the calls made since the last check against the record."""
        made, start = self.allocator.segment_events, self.num_checked
        self.num_checked = max(len(made), self.num_passed)
        for position in range(start, self.num_checked):
            ours = made[position] if position < len(made) else None
            theirs = self.recorded[position] if position < self.num_passed else None
            if ours is None or theirs is None or not self.same(ours, theirs):
                raise _Parted(f"driver call {position}: {ours}, recorded {theirs}")

    def same(self, ours: SegmentEvent, theirs: SegmentEvent) -> bool:
        return ours == theirs if self.follow else ours._replace(address=theirs.address) == theirs

    def recorded_address(self, size_bytes: int) -> int:
        """The address in the record of the driver call the model is about to make."""
        position = len(self.allocator.segment_events)
        if position >= self.num_passed:
            raise _Parted(f"driver call {position}: a segment of {size_bytes} B, recorded none")
        return self.recorded[position].address
