"""What `PYTORCH_ALLOC_CONF` (formerly `PYTORCH_CUDA_ALLOC_CONF`) says, as far as it changes sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from memplan.errors import MemplanError, UnknownNameError
from memplan.memory.allocator_sizes import (
    LARGE_SEGMENT_BYTES,
    MIN_LARGE_ALLOC_BYTES,
    NUM_ROUNDUP_INTERVALS,
)
from memplan.units import MIB

# Options that change when or how memory is taken, never how much.
_WITHOUT_EFFECT = frozenset(
    {
        "graph_capture_record_stream_reuse",
        "pinned_free_catch_all",
        "pinned_max_cached_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_num_register_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_use_background_threads",
        "pinned_use_cuda_host_register",
        "release_lock_on_cudamalloc",
    }
)
_MODELLED = (
    "backend",
    "expandable_segments",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "per_process_memory_fraction",
    "roundup_power2_divisions",
)
_OPTION = re.compile(r"(\w+):(\[[^\[\]]*\]|[^,\[\]]+)(?:,|$)")


@dataclass(frozen=True, slots=True)
class AllocatorConfig:
    """Settings of torch's caching allocator; the defaults are torch's.

    Raises:
        MemplanError: a value torch refuses.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    """Blocks of this size and above are not split; None: all may be."""
    max_non_split_rounding_bytes: int | None = None
    """How much larger than the request such a block may be; None: `large_segment_size_bytes`."""
    garbage_collection_threshold: float = 0.0
    """Fraction of `limit_bytes` above which old blocks are freed; without effect if there is no limit."""
    roundup_power2_divisions: tuple[int, ...] = ()
    """Steps between powers of two that requests are rounded up to: one number for each interval
    (up to 2 MiB, 2-4 MiB, … 32 GiB and above); 0 and 1 round to 512 B; empty: all 0."""
    large_segment_size_bytes: int = LARGE_SEGMENT_BYTES
    """Segment for requests of 1 to 10 MiB."""
    limit_bytes: int | None = None
    """`set_per_process_memory_fraction` as bytes: reserved + the new segment may not exceed it."""
    capacity_bytes: int | None = None
    """What the driver can give this process for segments; None: no end."""

    def __post_init__(self) -> None:
        large = self.large_segment_size_bytes
        if large <= MIN_LARGE_ALLOC_BYTES or large % MIB:
            raise MemplanError(f"large_segment_size_mb must be above {MIN_LARGE_ALLOC_BYTES // MIB}")
        for name, size in (
            ("max_split_size_mb", self.max_split_size_bytes),
            ("max_non_split_rounding_mb", self.max_non_split_rounding_bytes),
        ):
            if size is not None and (size < large or size % MIB):
                raise MemplanError(f"{name} must be {large // MIB} or more")
        if not 0.0 <= self.garbage_collection_threshold < 1.0:
            raise MemplanError("garbage_collection_threshold must lie between 0 and 1")
        divisions = self.roundup_power2_divisions
        if len(divisions) not in (0, NUM_ROUNDUP_INTERVALS):
            raise MemplanError(f"roundup_power2_divisions needs {NUM_ROUNDUP_INTERVALS} numbers")
        if any(n < 0 or n & (n - 1) for n in divisions):
            raise MemplanError("roundup_power2_divisions must be powers of two, or 0 for no rounding")
        for name, size in (("limit_bytes", self.limit_bytes), ("capacity_bytes", self.capacity_bytes)):
            if size is not None and size < 0:
                raise MemplanError(f"{name} must not be negative")

    @classmethod
    def parse(cls, text: str, *, device_bytes: int | None = None) -> AllocatorConfig:
        """The settings in `text`, written as `PYTORCH_ALLOC_CONF`: `name:value,name:[a:b,c:d]`.

        `device_bytes`, the device's total memory, turns `per_process_memory_fraction` into `limit_bytes`.
        Ref: `AcceleratorAllocatorConfig::parseArgs`, `CUDAAllocatorConfig::parseArgs`.

        Raises:
            MemplanError: an option or value that torch refuses, or that is not modelled.
        """
        fields: dict[str, Any] = {}
        for name, value in _options(text).items():
            if name in _WITHOUT_EFFECT:
                continue
            if name == "expandable_segments":
                fields[name] = _flag(name, value)
            elif name == "garbage_collection_threshold":
                fields[name] = _number(name, value, above=0.0, below=1.0)
            elif name == "roundup_power2_divisions":
                fields[name] = _divisions(value)
            elif name == "large_segment_size_mb":
                fields["large_segment_size_bytes"] = _count(name, value) * MIB
            elif name == "max_split_size_mb":
                fields["max_split_size_bytes"] = _count(name, value) * MIB
            elif name == "max_non_split_rounding_mb":
                fields["max_non_split_rounding_bytes"] = _count(name, value) * MIB
            elif name == "per_process_memory_fraction":
                fraction = _number(name, value)
                if fraction < 1.0:  # setMemoryFraction: 1 means no limit
                    if device_bytes is None:
                        raise MemplanError(f"{name} needs a GPU: it is a fraction of its memory")
                    fields["limit_bytes"] = int(fraction * device_bytes)
            elif name == "backend":
                if value != "native":
                    raise MemplanError(f"allocator backend `{value}` is not modelled", hints=["`native` is"])
            elif name == "throw_on_cudamalloc_oom":
                if _flag(name, value):
                    raise MemplanError(f"{name}:True is not modelled")
            else:
                raise UnknownNameError("allocator option", name, [*_MODELLED, *_WITHOUT_EFFECT])
        return cls(**fields)


def _options(text: str) -> dict[str, str]:
    packed, options, at = re.sub(r"\s", "", text), dict[str, str](), 0
    while at < len(packed):
        match = _OPTION.match(packed, at)
        if match is None:
            raise MemplanError(
                f"cannot read `{packed[at:]}` as allocator options",
                hints=["write them as in PYTORCH_ALLOC_CONF: `name:value,name:value`"],
            )
        options[match[1]] = match[2]
        at = match.end()
    return options


def _flag(name: str, value: str) -> bool:
    if value not in ("True", "False"):
        raise MemplanError(f"{name} must be True or False, not `{value}`")
    return value == "True"


def _count(name: str, value: str) -> int:
    if not value.isdecimal():
        raise MemplanError(f"{name} must be a whole number, not `{value}`")
    return int(value)


def _number(name: str, value: str, *, above: float = -1.0, below: float = 2.0) -> float:
    try:
        number = float(value)
    except ValueError:
        raise MemplanError(f"{name} must be a number, not `{value}`") from None
    if not (above < number < below and 0.0 <= number <= 1.0):
        raise MemplanError(f"{name} must lie between 0 and 1, not `{value}`")
    return number


def _divisions(value: str) -> tuple[int, ...]:
    """`8` for all sizes, or `[64:8,256:4,>:1]`: a size in MiB (a power of two) and the divisions from there.

    The first pair holds for smaller sizes too; an interval between two named ones stays 0, as in
    `parseRoundUpPower2Divisions`; `>` is everything above the last.
    """
    name = "roundup_power2_divisions"
    if not value.startswith("["):
        divisions = _count(name, value)
        if divisions == 0:
            raise MemplanError(f"{name} must be a power of two, not `{value}`")
        return (divisions,) * NUM_ROUNDUP_INTERVALS
    result, last, first = [0] * NUM_ROUNDUP_INTERVALS, 0, True
    for pair in value[1:-1].split(","):
        boundary, colon, count = pair.partition(":")
        if not colon:
            raise MemplanError(f"`{pair}` in {name} is not a pair", hints=["write `[64:8,256:4,>:1]`"])
        divisions = _count(name, count)
        if boundary == ">":
            result[last + 1 :] = [divisions] * (NUM_ROUNDUP_INTERVALS - last - 1)
            continue
        mebibytes = _count(name, boundary)
        if mebibytes == 0 or mebibytes & (mebibytes - 1):
            raise MemplanError(f"sizes in {name} must be powers of two, not `{boundary}`")
        last = min(mebibytes.bit_length() - 1, NUM_ROUNDUP_INTERVALS - 1)
        if first:
            result[:last] = [divisions] * last
            first = False
        result[last] = divisions
    return tuple(result)
