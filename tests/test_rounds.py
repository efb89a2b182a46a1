"""Micro-steps that repeat are skipped, and nothing but time is different."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest

from memplan import Estimate, TrainConfig, catalog
from memplan.memory import simulate as simulate_module
from memplan.memory.allocator import OutOfMemory
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.program import Program
from memplan.memory.simulate import Simulation, simulate
from memplan.units import MIB

RUNS: list[dict[str, Any]] = [
    {"stack": stack, "method": method, "gradient_accumulation_steps": 9, "seq_len": 512}
    for stack in ("torch", "trainer", "trl")
    for method in ("full", "lora", "qlora")
]
RUNS += [
    {"stack": "torch", "method": "lora", "gradient_checkpointing": True, "reentrant": True,
     "gradient_accumulation_steps": 9},
    {"method": "full", "optimizer": "adamw_bnb_8bit", "gradient_accumulation_steps": 6},
]  # fmt: skip
ALLOCATORS = ("expandable_segments:True", "max_split_size_mb:20", "roundup_power2_divisions:4")


def made(run: dict[str, Any], model: str = "smollm2-135m") -> Estimate:
    return Estimate(catalog.load(model), TrainConfig(**run), None)


def plays_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    count = [0]
    replay = simulate_module.replay

    def counted(*arguments: Any) -> None:
        count[0] += 1
        replay(*arguments)

    monkeypatch.setattr(simulate_module, "replay", counted)
    return count


@pytest.mark.parametrize(("run", "other"), list(zip(RUNS, cycle(ALLOCATORS), strict=False)), ids=str)
def test_skipping_changes_no_byte_of_any_phase(
    run: dict[str, Any], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = made(run).program
    count = plays_made(monkeypatch)
    for text in ("", other):
        config = AllocatorConfig.parse(text)
        count[0] = 0
        skipped = simulate(program, config)
        with_skips, count[0] = count[0], 0
        assert skipped == simulate(replace(program, rounds=[]), config)
        # blocks that are not split change places all the time
        assert with_skips < 0.95 * count[0] or other == "max_split_size_mb:20"


def outcome(program: Program, config: AllocatorConfig) -> Simulation | int:
    """What was played, or the bytes missing where it failed."""
    try:
        return simulate(program, config)
    except OutOfMemory as out:
        return out.missing_bytes


@pytest.mark.parametrize("run", RUNS[1::3], ids=str)
def test_skipping_changes_nothing_at_the_limit(run: dict[str, Any]) -> None:
    estimate = made(run)
    program, plain = estimate.program, replace(estimate.program, rounds=[])
    ends: set[type] = set()
    for part in (100, 99, 97, 94, 90, 80):
        config = AllocatorConfig(capacity_bytes=estimate.reserved_bytes * part // 100)
        found = outcome(program, config)
        assert found == outcome(plain, config)
        ends.add(type(found))
    assert ends == {Simulation, int}


def test_more_micro_steps_cost_no_more_plays(monkeypatch: pytest.MonkeyPatch) -> None:
    count = plays_made(monkeypatch)
    found = []
    for steps in (8, 16):
        program = made({"gradient_accumulation_steps": steps}).program
        count[0] = 0
        simulate(program)
        found.append(count[0])
    assert found[1] < 1.1 * found[0]


def test_garbage_collection_is_played_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks then differ by age as well."""
    program = made(RUNS[0]).program
    count = plays_made(monkeypatch)
    config = AllocatorConfig(garbage_collection_threshold=0.5, limit_bytes=8 * 1024 * MIB)
    simulate(program, config)
    with_rounds, count[0] = count[0], 0
    simulate(replace(program, rounds=[]), config)
    assert with_rounds == count[0]
