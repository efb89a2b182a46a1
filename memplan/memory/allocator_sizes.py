"""The sizes torch's caching allocator deals in: of a block for a request, of a segment for a block.

Source of every rule in the `allocator*` modules: pytorch `c10/cuda/CUDACachingAllocator.cpp`, class
`DeviceCachingAllocator`, and `c10/core/AllocatorConfig.h`, as of torch 2.11. Each rule names its function.
"""

from __future__ import annotations

from collections.abc import Sequence

from memplan.units import MIB

# c10/core/AllocatorConfig.h
MIN_BLOCK_BYTES = 512  # kMinBlockSize
SMALL_SIZE_BYTES = MIB  # kSmallSize: larger requests go to the large pool
SMALL_BUFFER_BYTES = 2 * MIB  # kSmallBuffer: a segment of the small pool
MIN_LARGE_ALLOC_BYTES = 10 * MIB  # kMinLargeAlloc: from here on a request gets a segment of its own size
ROUND_LARGE_BYTES = 2 * MIB  # kRoundLarge
LARGE_SEGMENT_BYTES = 20 * MIB  # large_segment_size_: for requests between the two

# kRoundUpPowerOfTwoIntervals: sizes up to 2 MiB, then one interval a power of two, up to 32 GiB and above
NUM_ROUNDUP_INTERVALS = 16


def round_size(num_bytes: int, divisions: Sequence[int] = ()) -> int:
    """Bytes of the block for a request: up to 512 B, or to a step between powers of two (`round_size`).

    `divisions` is `AllocatorConfig.roundup_power2_divisions`. With 4, requests of 8 to 16 MiB go to 8, 10,
    12, 14 or 16 MiB (`roundup_power2_next_division`); up to 512 B a division the other rule holds.
    """
    if divisions and num_bytes >= MIN_BLOCK_BYTES:
        exponent = num_bytes.bit_length() - 1
        # AcceleratorAllocatorConfig::roundup_power2_divisions: the interval of 1 MiB is the first
        interval = min(max(exponent - (MIB.bit_length() - 1), 0), NUM_ROUNDUP_INTERVALS - 1)
        steps = divisions[interval]
        if steps > 1 and num_bytes > MIN_BLOCK_BYTES * steps:
            step = (1 << exponent) // steps
            return -(-num_bytes // step) * step
    return max(-(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES, MIN_BLOCK_BYTES)


def segment_size(size_bytes: int, large_segment_size_bytes: int = LARGE_SEGMENT_BYTES) -> int:
    """Bytes asked of the driver for a block of `size_bytes`, a rounded size (`get_allocation_size`)."""
    if size_bytes <= SMALL_SIZE_BYTES:
        return SMALL_BUFFER_BYTES
    if size_bytes < MIN_LARGE_ALLOC_BYTES:
        return large_segment_size_bytes
    return -(-size_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
