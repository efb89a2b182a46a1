"""Play tapes of allocations and frees on the caching allocator.

A tape is a sequence of (slot, size in bytes): a size above 0 allocates into that slot, 0 frees what is there.
Slots are small integers that index a list, which outlives the tape: what one tape leaves, another may free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memplan.memory.allocator import CachingAllocator
from memplan.memory.allocator_blocks import Block

Slots = list[Block | None]


def replay(allocator: CachingAllocator, tape: Iterable[tuple[int, int]], slots: Slots, stream: int = 0) -> None:
    """Play `tape` once; `slots` holds the live blocks, None where there is none.

    Raises:
        OutOfMemory: as `CachingAllocator.malloc`; `slots` then holds what was live.
    """
    malloc, free = allocator.malloc, allocator.free
    for slot, num_bytes in tape:
        if num_bytes:
            slots[slot] = malloc(num_bytes, stream)
        else:
            block = slots[slot]
            assert block is not None
            free(block)
            slots[slot] = None


def repeat(
    allocator: CachingAllocator,
    tape: Sequence[tuple[int, int]],
    num_times: int,
    slots: Slots,
    stream: int = 0,
) -> int:
    """Play `tape` `num_times`, skipping what cannot change anything; returns the number of plays made.

    Exact: once memory lies as it did before an earlier play, the plays since then would be repeated, so that
    only what is left of that cycle is played. Counters (`segment_events`, `num_alloc_retries`) are those of
    the plays made. Nothing is skipped while garbage collection is on: blocks then differ by age.

    Raises:
        OutOfMemory: as `replay`.
    """
    seen: dict[object, int] = {}
    for played in range(num_times):
        if not allocator.collects_garbage:
            layout = (allocator.layout(), tuple(-1 if block is None else block.address for block in slots))
            if layout in seen:
                left = (num_times - played) % (played - seen[layout])
                for _ in range(left):
                    replay(allocator, tape, slots, stream)
                return played + left
            seen[layout] = played
        replay(allocator, tape, slots, stream)
    return num_times
