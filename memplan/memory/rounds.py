"""Micro-steps that repeat: once memory lies as it did before an earlier one, those in between need no second play.

Exact, and it holds without a look at sizes: what the allocator does depends on where free memory lies and on the
requests, so that from the same layout the same tapes lead through the same states. Held against a full replay by
tests/test_rounds.py.
"""

from __future__ import annotations

from memplan.memory.allocator import CachingAllocator
from memplan.memory.allocator_replay import Slots
from memplan.memory.program import Program, Round


class Skipper:
    """Watches the rounds of one run and says where the play may go on."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._at = {made.begin: number for number, made in enumerate(program.rounds)}
        self._alike: list[int] = _alike(program)
        self._seen: dict[object, int] = {}
        self._num_events = -1

    def skip(self, position: int, allocator: CachingAllocator, frames: list[Slots]) -> int:
        """The play to go on with, given that `position` is next; blocks that a later play frees are handed on.

        Nothing is skipped across a call to the driver, which may hand out another address the next time, nor
        while garbage collection is on, for which blocks differ by age.
        """
        number = self._at.get(position)
        if number is None or allocator.collects_garbage:
            return position
        rounds, end = self._program.rounds, self._alike[number]
        if self._num_events != len(allocator.segment_events):
            self._num_events = len(allocator.segment_events)
            self._seen.clear()
        key = self._alike[number], allocator.layout(), self._carried(number, frames)
        before = self._seen.setdefault(key, number)
        cycle = number - before
        num_skipped = (end - number) // cycle * cycle if cycle else 0
        if not num_skipped:
            return position
        size = rounds[number].first_frame - rounds[number - 1].first_frame
        to = rounds[number].first_frame + num_skipped * size
        for offset in range(1, cycle * size + 1):
            frames[to - offset] = frames[rounds[number].first_frame - offset]
        return rounds[number + num_skipped - 1].end

    def _carried(self, number: int, frames: list[Slots]) -> tuple[int, ...]:
        """Where the blocks lie that this round frees and an earlier play made."""
        made = self._program.rounds[number]
        found = []
        for play in self._program.plays[made.begin : made.end]:
            if play.frame < made.first_frame:
                for slot, size in play.tape:
                    block = frames[play.frame][slot]
                    found.append(-1 if size or block is None else block.address)
        return tuple(found)


def _alike(program: Program) -> list[int]:
    """For each round, the number of the round after the last that does what it does in a row."""
    rounds = program.rounds
    ends = list(range(1, len(rounds) + 1))
    for number in reversed(range(len(rounds) - 1)):
        following = rounds[number + 1]
        if rounds[number].end == following.begin and _same(program, rounds[number], following):
            ends[number] = ends[number + 1]
    return ends


def _same(program: Program, a: Round, b: Round) -> bool:
    if a.end - a.begin != b.end - b.begin:
        return False
    shift = b.first_frame - a.first_frame
    return all(
        x.tape == y.tape
        and x.phase == y.phase
        and x.loads == y.loads
        and x.frame + shift == y.frame
        and [(to + shift, ts, of + shift, fs) for to, ts, of, fs in x.links] == list(y.links)
        for x, y in zip(program.plays[a.begin : a.end], program.plays[b.begin : b.end], strict=True)
    )
