"""What torch's own allocator did on a GPU, request by request, against the model.

`tests/data/allocator`: `torch.cuda.memory._record_memory_history` over whole runs of a three-layer Llama (hidden 1024,
vocabulary 8000, 2 x 512 tokens, plain loop) on an NVIDIA H200, driver 580.159.04, torch 2.11.0+cu130, as `memplan
calibrate` writes it, stack frames left out. `oom` ran under a limit of 400 MiB. Under other settings
(PYTORCH_ALLOC_CONF, `SETTINGS`), on an H100 too: `split` and `full-adafactor` with a vocabulary of 32000, so that there
are blocks too large to be split; `collect` under a limit, without which nothing is collected.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memplan.calibration.trace import Part, read_trace
from memplan.memory import allocator_blocks, allocator_replay
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.allocator_trace import TraceComparison, replay_trace
from memplan.units import MIB

SETTINGS = {
    # name: PYTORCH_ALLOC_CONF, limit in MiB, peaks of reserved and allocated as the run itself reported them
    "h100-expandable-full": ("expandable_segments:True", None, 694_157_312, 648_440_832),
    "h100-expandable-full-adafactor": ("expandable_segments:True", None, 1_218_445_312, 1_015_617_024),
    "h100-expandable-lora-ckpt": ("expandable_segments:True", None, 346_030_080, 291_586_048),
    "h100-expandable-qlora": ("expandable_segments:True", None, 520_093_696, 496_848_896),
    "h200-split-full": ("max_split_size_mb:32", None, 1_577_058_304, 1_261_333_504),
    "h200-split-qlora": ("max_split_size_mb:32", None, 1_092_616_192, 1_003_048_960),
    "h100-collect-full": ("garbage_collection_threshold:0.6", 760, 698_351_616, 662_596_608),
    "h100-collect-lora-ckpt": ("garbage_collection_threshold:0.6", 420, 320_864_256, 297_877_504),
}
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
    monkeypatch.setattr(allocator_replay, "SMALL_SIZE_BYTES", 2 * MIB)
    assert replayed(name).difference is not None


def under_settings(name: str, text: str, limit: int | None) -> TraceComparison:
    (part,) = read_trace(HISTORIES / f"{name}.jsonl.gz")
    assert part.num_dropped == 0
    settings = AllocatorConfig.parse(text) if text else AllocatorConfig()
    return replay_trace(part.entries(), replace(settings, limit_bytes=None if limit is None else limit * MIB))


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_block_lies_where_it_lay_under_other_settings(name: str) -> None:
    text, limit, reserved_bytes, allocated_bytes = SETTINGS[name]
    result = under_settings(name, text, limit)
    assert result.difference is None
    assert result.num_allocs > 1000
    assert (result.peak_reserved_bytes, result.peak_allocated_bytes) == (reserved_bytes, allocated_bytes)
    assert under_settings(name, "", limit).difference is not None  # torch's own settings would not have


def test_what_is_collected_delays_running_out_as_it_did() -> None:
    text = "garbage_collection_threshold:0.6"
    assert under_settings("h100-collect-full-oom", text, 500).difference is None
    for limit in (490, 520):
        assert under_settings("h100-collect-full-oom", text, limit).difference is not None
    assert under_settings("h100-collect-full-oom", "", 500).difference is not None
