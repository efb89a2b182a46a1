"""Folds a program into bytes: live after every play, the peak of every phase, and what is alive at the peak.

Each tape is summed once: its net change and its highest point, by kind. Layers that share a tape then cost one
addition each, however many events the tape has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.memory.program import BEFORE_STEPS, Frame, Program
from memplan.ops.tensor import Tape

Bytes = dict[str, int]


@dataclass(slots=True)
class TapeSum:
    """A tape over one frame: net change and state at its highest point, bytes by kind."""

    net: Bytes
    peak: Bytes
    net_total: int
    peak_total: int


@dataclass
class PhasePeak:
    peak_bytes: int = 0
    end_bytes: int = 0


@dataclass
class Ledger:
    """Bytes of live tensors over the run."""

    phases: list[dict[str, PhasePeak]] = field(default_factory=list)
    """One dict a step; the load is under "load" of step 0."""
    peak_bytes: int = 0
    peak_phase: str = ""
    peak_step: int = 0
    components: Bytes = field(default_factory=dict)


def sum_tape(tape: Tape, frame: Frame) -> TapeSum:
    kinds, sizes = frame.kinds, frame.sizes
    net: Bytes = {}
    live = best = best_at = 0
    for position, (slot, size) in enumerate(tape):
        live += size or -sizes[slot]
        if live > best:
            best, best_at = live, position + 1
    for slot, size in tape[:best_at]:
        kind = kinds[slot]
        net[kind] = net.get(kind, 0) + (size or -sizes[slot])
    peak = net.copy()
    for slot, size in tape[best_at:]:
        kind = kinds[slot]
        net[kind] = net.get(kind, 0) + (size or -sizes[slot])
    return TapeSum(net, peak, live, best)


def peak_of(program: Program) -> int:
    """The `peak_bytes` of `fold` alone, in half the time."""
    sums: dict[tuple[int, int], tuple[int, int]] = {}
    total = peak = 0
    for play in program.plays:
        sizes = program.frames[play.frame].sizes
        key = id(play.tape), id(sizes)
        found = sums.get(key)
        if found is None:
            live = best = 0
            for slot, size in play.tape:
                live += size or -sizes[slot]
                if live > best:
                    best = live
            found = sums[key] = live, best
        if total + found[1] > peak and play.phase not in BEFORE_STEPS:
            peak = total + found[1]
        total += found[0]
    return peak


def fold(program: Program) -> Ledger:
    """The ledger of `program`."""
    ledger = Ledger()
    sums: dict[tuple[int, int], TapeSum] = {}
    live: Bytes = {}
    total = 0
    for play in program.plays:
        frame = program.frames[play.frame]
        key = id(play.tape), id(frame.sizes)
        tape_sum = sums.get(key)
        if tape_sum is None:
            tape_sum = sums[key] = sum_tape(play.tape, frame)
        while len(ledger.phases) <= play.step:
            ledger.phases.append({})
        phase = ledger.phases[play.step].setdefault(play.phase, PhasePeak(total, total))
        high = total + tape_sum.peak_total
        if high > phase.peak_bytes:
            phase.peak_bytes = high
        if high > ledger.peak_bytes and play.phase not in BEFORE_STEPS:
            ledger.peak_bytes, ledger.peak_phase, ledger.peak_step = high, play.phase, play.step
            ledger.components = {
                k: live.get(k, 0) + tape_sum.peak.get(k, 0) for k in live.keys() | tape_sum.peak.keys()
            }
        for kind, change in tape_sum.net.items():
            live[kind] = live.get(kind, 0) + change
        total += tape_sum.net_total
        phase.end_bytes = total
    return ledger
