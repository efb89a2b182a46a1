"""The state of the caching allocator after each phase of runs on an H200: what `torch.cuda` counted, and every segment
and block.

The model is given the sizes that were asked for and, so that ties fall alike, the addresses of the driver's segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from memplan.calibration.record import Record, read_records
from memplan.calibration.trace import Part, read_trace
from memplan.memory.allocator import CachingAllocator
from memplan.memory.allocator_blocks import Block
from memplan.traced_runs import traces_of

RECORDS = Path(__file__).parent / "data" / "traced" / "h200.jsonl"
NAMES = ("run-llama-lora-ckpt", "run-llama-qlora", "run-llama-full-8bit")


@cache
def traced(name: str) -> tuple[Record, Part]:
    record = next(record for record in read_records(RECORDS).records if record.case.id == name)
    (part,) = read_trace(traces_of(RECORDS) / f"{name}.jsonl.gz")
    return record, part


@pytest.mark.parametrize("name", NAMES)
def test_each_phase_ends_with_what_torch_counted(name: str) -> None:
    record, part = traced(name)
    passed = [(s.allocator.allocated_bytes, s.allocator.reserved_bytes) for s in states_at_marks(part)]
    assert len(passed) == len(part.marks)
    # The last phase has no mark behind it, and between preparing and the first step the batch is made.
    ended = [(*mark[:3], *sizes) for mark, sizes in zip(part.marks, passed[1:], strict=False) if mark[0]]
    counted = [p for p in record.phases if p.step][: len(ended)]
    assert [(*end[:3], end[4]) for end in ended] == [(p.step, p.micro_step, p.phase, p.reserved_bytes) for p in counted]
    # At the end of backward some blocks of the graph (0.5 KiB to 4 MiB here) go between the reading of the bytes and
    # the count of frees that cuts the trace: there the two are not of one moment.
    sure = [(end, p) for end, p in zip(ended, counted, strict=True) if p.phase != "backward"]
    assert [end[3] for end, _ in sure] == [p.allocated_bytes for _, p in sure]
    assert len(ended) >= 14


@pytest.mark.parametrize("name", NAMES)
def test_segments_and_blocks_are_the_recorded_ones_at_the_end_of_each_phase(name: str) -> None:
    most = 0
    for state in states_at_marks(traced(name)[1]):
        segments = state.allocator.segments()
        assert {segment.address: segment.size_bytes for segment in segments} == state.segments
        found = {}
        for segment in segments:
            address = segment.address
            for block in segment.blocks:
                if block.state == "allocated":
                    found[address] = block.requested_bytes
                address += block.size_bytes
        assert found == state.live
        most = max(most, len(found))
    assert most > 60


@dataclass
class State:
    """The model, and what the record's own events leave: bytes by address."""

    allocator: CachingAllocator
    segments: dict[int, int]
    live: dict[int, int]


def states_at_marks(part: Part) -> Iterator[State]:
    """Plays `part` on the model; yields as each mark is passed. The state is one and the same, and goes on changing."""
    addresses = iter([event.address for event in part.events if event.action == "sa"])
    allocator = CachingAllocator(new_segment_address=lambda size_bytes: next(addresses))
    blocks: dict[int, Block] = {}
    state = State(allocator, {}, {})
    mark = -1
    for event in part.events:
        while mark < event.mark:
            mark += 1
            yield state
        if event.action == "a":
            blocks[event.address] = allocator.malloc(event.num_bytes, event.stream)
            state.live[event.address] = event.num_bytes
        elif event.action == "f":
            allocator.free(blocks.pop(event.address))
            del state.live[event.address]
        elif event.action == "sa":
            state.segments[event.address] = event.num_bytes
        elif event.action == "sf":
            del state.segments[event.address]
            allocator.empty_cache()  # nothing else gives memory back in a run without a limit
