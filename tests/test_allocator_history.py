"""What torch's own allocator did on a GPU, request by request, against the model.

`tests/data/allocator`: `torch.cuda.memory._record_memory_history` over whole runs of a three-layer Llama (hidden 1024,
vocabulary 8000, 2 x 512 tokens, plain loop) on an NVIDIA H200, driver 580.159.04, torch 2.11.0+cu130, as `memplan
calibrate` writes it, stack frames left out. `oom` ran under a limit of 400 MiB.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from memplan.calibration.trace import Part, read_trace
from memplan.memory import allocator, allocator_blocks
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.allocator_trace import TraceComparison, replay_trace
from memplan.units import MIB

HISTORIES = Path(__file__).parent / "data" / "allocator"
NAMES = ("full", "full-8bit", "lora-ckpt", "qlora")
RESERVED_BYTES = {"full": 692_060_160, "full-8bit": 564_133_888, "lora-ckpt": 367_001_600, "qlora": 654_311_424}
"""`max_memory_reserved` over the steps, as the run itself reported it."""
ALLOCATED_BYTES = {"full": 622_226_432, "full-8bit": 522_900_480, "lora-ckpt": 291_135_488, "qlora": 612_683_776}


def history(name: str) -> Part:
    (part,) = read_trace(HISTORIES / f"h200-{name}.jsonl.gz")
    assert not part.segments  # it began before the first allocation
    assert part.num_dropped == 0
    return part


def replayed(name: str, config: AllocatorConfig | None = None) -> TraceComparison:
    return replay_trace(history(name).entries(), config)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_lies_where_it_lay(name: str) -> None:
    """To the address, and every call to the driver of the same size at the same place."""
    result = replayed(name)
    assert result.difference is None
    assert result.num_allocs > 1400
    assert result.num_segment_events >= 26
    assert result.peak_reserved_bytes == RESERVED_BYTES[name]
    assert result.peak_allocated_bytes == ALLOCATED_BYTES[name]


def test_it_runs_out_of_memory_where_the_gpu_did() -> None:
    assert replayed("oom", AllocatorConfig(limit_bytes=400 * MIB)).difference is None
    for limit_bytes in (390 * MIB, 420 * MIB):
        assert replayed("oom", AllocatorConfig(limit_bytes=limit_bytes)).difference is not None


@pytest.mark.parametrize("name", NAMES)
def test_other_settings_would_have_left_another_history(name: str) -> None:
    for text in ("large_segment_size_mb:24", "roundup_power2_divisions:4", "expandable_segments:True"):
        assert replayed(name, AllocatorConfig.parse(text)).difference is not None


@pytest.mark.parametrize("name", NAMES)
def test_another_rule_of_splitting_would_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = replayed(name)
    monkeypatch.setattr(allocator_blocks, "SMALL_SIZE_BYTES", MIB // 2)  # a rest of half a MiB would stay free
    assert replayed(name) != recorded


@pytest.mark.parametrize("name", NAMES)
def test_another_border_between_the_pools_would_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "SMALL_SIZE_BYTES", 2 * MIB)
    assert replayed(name).difference is not None
