"""`PYTORCH_ALLOC_CONF` read as torch reads it."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.errors import MemplanError
from memplan.memory.allocator_config import AllocatorConfig
from memplan.units import MIB


def test_parse() -> None:
    """The values of torch's own `c10/test/core/AllocatorConfig_test.cpp`."""
    config = AllocatorConfig.parse(
        "max_split_size_mb:40, max_non_split_rounding_mb:30, garbage_collection_threshold:0.5,"
        "roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1], expandable_segments:True,"
        "pinned_use_background_threads:True"
    )
    assert (config.max_split_size_bytes, config.max_non_split_rounding_bytes) == (40 * MIB, 30 * MIB)
    assert (config.garbage_collection_threshold, config.expandable_segments) == (0.5, True)
    wanted = {32: 8, 64: 8, 128: 2, 256: 4, 512: 2, 1024: 4, 2048: 1, 4096: 1, 8192: 1}  # by MiB
    divisions = config.roundup_power2_divisions
    assert {mib: divisions[mib.bit_length() - 1] for mib in wanted} == wanted


def test_parse_other_values() -> None:
    assert AllocatorConfig.parse("") == AllocatorConfig()
    assert AllocatorConfig.parse("large_segment_size_mb:15").large_segment_size_bytes == 15 * MIB
    assert AllocatorConfig.parse("roundup_power2_divisions:4").roundup_power2_divisions == (4,) * 16
    half = AllocatorConfig.parse("per_process_memory_fraction:0.5", device_bytes=80 * MIB)
    assert half.limit_bytes == 40 * MIB
    assert AllocatorConfig.parse("per_process_memory_fraction:1.0,backend:native") == AllocatorConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expandable_segments:true", "must be True or False"),
        ("expandable_segment:True", "unknown allocator option"),
        ("max_split_size_mb:10", "max_split_size_mb must be 20 or more"),
        ("max_split_size_mb:abc", "whole number"),
        ("max_non_split_rounding_mb:10", "max_non_split_rounding_mb must be 20 or more"),
        ("max_split_size_mb=40", "cannot read"),
        ("max_split_size_mb", "cannot read"),
        ("large_segment_size_mb:10", "above 10"),
        ("garbage_collection_threshold:1.0", "between 0 and 1"),
        ("garbage_collection_threshold:0", "between 0 and 1"),
        ("garbage_collection_threshold:nan", "between 0 and 1"),
        ("garbage_collection_threshold:high", "must be a number"),
        ("roundup_power2_divisions:3", "powers of two"),
        ("roundup_power2_divisions:0", "power of two"),
        ("roundup_power2_divisions:[63:8]", "powers of two"),
        ("roundup_power2_divisions:[64:3]", "powers of two"),
        ("roundup_power2_divisions:[64]", "not a pair"),
        ("per_process_memory_fraction:0.5", "needs a GPU"),
        ("per_process_memory_fraction:1.5", "between 0 and 1"),
        ("backend:cudaMallocAsync", "not modelled"),
        ("throw_on_cudamalloc_oom:True", "not modelled"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(MemplanError, match=message):
        AllocatorConfig.parse(text)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "text",
    [
        "max_split_size_mb:40",
        "max_split_size_mb:19",
        "large_segment_size_mb:15,max_split_size_mb:15",
        "max_split_size_mb:15,large_segment_size_mb:15",
        "large_segment_size_mb:10",
        "max_non_split_rounding_mb:10",
        "expandable_segments:True,",
        "expandable_segments:true",
        "garbage_collection_threshold:1.0",
        "garbage_collection_threshold:0.99",
        "roundup_power2_divisions:[64:8,256:0,>:1]",
        "roundup_power2_divisions:[63:8]",
        "roundup_power2_divisions:[64:3]",
        "roundup_power2_divisions:0",
        "max_split_size_mb",
    ],
)
def test_parse_refuses_what_torch_refuses(text: str) -> None:
    torch = pytest.importorskip("torch")

    def accepted(reader: Any, error: Any) -> bool:
        try:
            reader(text)
        except error:
            return False
        return True

    try:
        by_torch = accepted(torch._C._accelerator_setAllocatorSettings, (ValueError, RuntimeError))
    finally:
        torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20,expandable_segments:False")
    assert accepted(AllocatorConfig.parse, MemplanError) == by_torch
