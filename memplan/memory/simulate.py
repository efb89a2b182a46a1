"""Replays a program on the caching allocator: allocated and reserved bytes as `torch.cuda` would report them."""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.garbage import collector_paused
from memplan.memory.allocator import CachingAllocator
from memplan.memory.allocator_blocks import Block
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.allocator_replay import replay
from memplan.memory.driver_addresses import DriverAddresses
from memplan.memory.program import BEFORE_STEPS, EMPTY_CACHE, Program
from memplan.memory.rounds import Skipper


@dataclass(slots=True)
class PhaseMemory:
    """Bytes at the end of a phase and at its highest, of both tiers."""

    allocated_bytes: int
    peak_allocated_bytes: int
    reserved_bytes: int
    peak_reserved_bytes: int


@dataclass
class Simulation:
    phases: list[dict[str, PhaseMemory]] = field(default_factory=list)
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    highest_reserved_bytes: int = 0
    """Over the load as well, which the peaks leave out."""
    met_limit: bool = False
    """Whether a request was ever refused; if not, the same run without a limit is this one to the byte."""


@collector_paused()
def simulate(program: Program, config: AllocatorConfig | None = None) -> Simulation:
    """Plays `program` on a fresh allocator.

    Raises:
        memplan.memory.allocator.OutOfMemory: the limit in `config` was reached.
    """
    addresses = DriverAddresses()
    allocator = CachingAllocator(config, new_segment_address=addresses.take)
    addresses.follow(allocator.segment_events)
    result = Simulation()
    frames: list[list[Block | None]] = [[None] * frame.num_slots for frame in program.frames]
    here: tuple[int, str] | None = None
    memory = PhaseMemory(0, 0, 0, 0)
    skipper = Skipper(program)
    position, end = 0, len(program.plays)
    while (position := skipper.skip(position, allocator, frames)) < end:
        play = program.plays[position]
        position += 1
        if (play.step, play.phase) != here:
            here = play.step, play.phase
            while len(result.phases) <= play.step:
                result.phases.append({})
            memory = result.phases[play.step].setdefault(play.phase, PhaseMemory(0, 0, 0, 0))
            allocator.reset_peak()
        addresses.load(play.loads)
        for to_frame, to_slot, from_frame, from_slot in play.links:
            frames[to_frame][to_slot] = frames[from_frame][from_slot]
        if play.tape is EMPTY_CACHE:
            allocator.empty_cache()
        else:
            replay(allocator, play.tape, frames[play.frame])
        memory.allocated_bytes = allocator.allocated_bytes
        memory.reserved_bytes = allocator.reserved_bytes
        memory.peak_allocated_bytes = max(memory.peak_allocated_bytes, allocator.peak_allocated_bytes)
        memory.peak_reserved_bytes = max(memory.peak_reserved_bytes, allocator.peak_reserved_bytes)
    trained = [m for step in result.phases for phase, m in step.items() if phase not in BEFORE_STEPS]
    result.peak_allocated_bytes = max(m.peak_allocated_bytes for m in trained)
    result.peak_reserved_bytes = max(m.peak_reserved_bytes for m in trained)
    result.highest_reserved_bytes = max(m.peak_reserved_bytes for step in result.phases for m in step.values())
    result.met_limit = allocator.met_limit
    return result
