"""The order of segments in the address space, against recorded runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memplan import estimate
from memplan.calibration.trace import read_trace
from memplan.memory import simulate
from memplan.memory.allocator import CachingAllocator
from memplan.memory.allocator_blocks import SegmentEvent
from memplan.memory.driver_addresses import KERNELS, DriverAddresses
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig
from memplan.units import MIB

HISTORIES = Path(__file__).parent / "data" / "allocator"
LLAMA = {
    "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3,
    "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "h200-full": {"method": "full", "optimizer": "adamw_torch"},
    "h200-full-8bit": {"method": "full", "optimizer": "adamw_bnb_8bit"},
    "h200-lora-ckpt": {"method": "lora", "gradient_checkpointing": True},
    "h200-qlora": {"method": "qlora", "kbit_prep": True},
}
Segments = list[tuple[str, int, int]]
"""(action, bytes, place in the order of all addresses)"""


def in_order(events: list[tuple[str, int, int]]) -> Segments:
    """`events`: (action, bytes, address)."""
    places = {address: place for place, address in enumerate(sorted({address for _, _, address in events}))}
    return [(action, size, places[address]) for action, size, address in events]


@pytest.mark.parametrize("name", RUNS)
def test_a_predicted_run_takes_the_segments_of_the_recorded_one_in_their_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, moments and the order in the address space of every call to the driver, of a run that is only predicted.

    But for the first: the measuring script's own small tensor came before the model.
    """
    (part,) = read_trace(HISTORIES / f"{name}.jsonl.gz")
    recorded = [
        (entry["action"], entry["size"], entry["addr"])
        for entry in part.entries()
        if entry["action"] in ("segment_alloc", "segment_free")
    ]
    made: list[CachingAllocator] = []

    def keep(*args: Any, **kwargs: Any) -> CachingAllocator:
        made.append(CachingAllocator(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(simulate, "CachingAllocator", keep)
    config = TrainConfig(stack="torch", micro_batch_size=2, seq_len=512, **RUNS[name])
    assert estimate(ModelSpec.from_hf_config(LLAMA), config, gpu="h200").reserved_bytes
    predicted = [(event.action, event.size_bytes, event.address) for event in made[-1].segment_events]
    first_small, *rest = in_order(recorded)
    of_model = in_order(predicted)
    assert of_model.count(first_small) == 1
    of_model.remove(first_small)
    assert of_model == rest
    assert len(rest) > 20


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_take_their_place_once(name: str) -> None:
    driver = DriverAddresses()
    driver.load([name])
    after = driver.take(34 * MIB)
    driver.load([name])
    assert driver.take(34 * MIB) == after + 34 * MIB
    fresh = DriverAddresses().take(34 * MIB)
    assert 0 <= after - fresh <= sum(map(sum, KERNELS.values()))


def test_the_first_reservation_lies_above_all_others_unless_a_library_was_there_before() -> None:
    for kernels, left_mib, is_highest in (["elementwise"], 404, True), (["products"], 340, False):
        driver = DriverAddresses()
        driver.load(kernels)
        in_arena = driver.take(left_mib * MIB)
        above = driver.take(22 * MIB)
        first, second = driver.take(30 * MIB), driver.take(30 * MIB)
        assert second < in_arena < above
        assert first > second
        assert (first > above) is is_highest


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
