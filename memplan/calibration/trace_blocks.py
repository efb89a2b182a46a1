"""The blocks of a trace: when each was allocated and freed, in which phase, and where the allocated peak falls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

from memplan.calibration.trace import Part
from memplan.errors import MemplanError
from memplan.ops.tensor import round_block

GAP = "before the trace"
"""Phase of the blocks that a part finds when it begins: nobody saw them made."""
_STARTER = ("typer/", "_click/", "click/")


@dataclass(slots=True)
class Stretch:
    """The events from one mark to the next; `end` is the first event that is not in it."""

    step: int
    micro_step: int
    phase: str
    begin: int
    end: float = inf


@dataclass(slots=True, eq=False)
class Block:
    """One allocation. `born` and `dies` are numbers of events; `dies` is infinite if the trace does not see it."""

    num_bytes: int
    """Whole blocks of 512 bytes, as memplan's ledger counts."""
    frames: list[str]
    stretch: Stretch
    born: int
    dies: float = inf

    def made_in(self, *places: str) -> bool:
        return any(place in frame for frame in self.frames for place in places)

    @property
    def is_from_python(self) -> bool:
        return any(":" in frame for frame in self.frames)


@dataclass
class History:
    """All blocks and stretches of a trace, in order."""

    blocks: list[Block] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    has_gap: bool = False
    """The trace holds the load and one step: what was allocated between them has no stack."""
    _live: dict[int, Block] = field(default_factory=dict)
    _now: int = 0

    @classmethod
    def of(cls, parts: Sequence[Part]) -> History:
        """The history of `parts`, in order.

        Raises:
            MemplanError: events were dropped from the trace, or it frees what it has not seen.
        """
        history = cls(has_gap=len(parts) > 1)
        if any(part.num_dropped for part in parts):
            raise MemplanError("the trace was cut short: it grew beyond what a trace file may hold")
        for part in parts:
            history._enter(part)
            history._play(part)
        return history

    def _enter(self, part: Part) -> None:
        """What is live as the part begins. The same size at the same address is taken for the same block."""
        self._turn(0, 0, GAP)
        held = dict(_active(part))
        for address, block in list(self._live.items()):
            if held.get(address) != block.num_bytes:
                self._live.pop(address).dies = self._now
        for address, num_bytes in held.items():
            if address not in self._live:
                self._make(address, num_bytes, [])

    def _play(self, part: Part) -> None:
        mark = -1
        for event in part.events:
            if event.action not in ("a", "f"):
                continue
            self._now += 1
            if event.mark != mark:
                mark = event.mark
                self._turn(*part.marks[mark][:3])
            if event.action == "a":
                frames = [frame for frame in part.frames(event) if not frame.startswith(_STARTER)]
                self._make(event.address, round_block(event.num_bytes), frames)
            elif event.address in self._live:
                self._live.pop(event.address).dies = self._now
            else:
                raise MemplanError(f"the trace frees {event.address:#x}, which it has not seen allocated")

    def _turn(self, step: int, micro_step: int, phase: str) -> None:
        if self.stretches:
            self.stretches[-1].end = self._now
        self.stretches.append(Stretch(step, micro_step, phase, self._now))

    def _make(self, address: int, num_bytes: int, frames: list[str]) -> None:
        block = Block(num_bytes, frames, self.stretches[-1], self._now)
        self._live[address] = block
        self.blocks.append(block)

    @cached_property
    def peak(self) -> tuple[int, int]:
        """Highest sum of live blocks over the steps, in bytes, and the event that first reaches it."""
        changes: Counter[int] = Counter()
        for block in self.blocks:
            changes[block.born] += block.num_bytes
            if block.dies < inf:
                changes[int(block.dies)] -= block.num_bytes
        live = highest = at = 0
        for number, change in sorted(changes.items()):
            live += change
            if live > highest and self.stretch_at(number).step:
                highest, at = live, number
        return highest, at

    def stretch_at(self, number: float) -> Stretch:
        """The last stretch that has begun at event `number`."""
        return next(stretch for stretch in reversed(self.stretches) if stretch.begin <= number)

    def made_during(self, stretch: Stretch) -> list[Block]:
        return [block for block in self.blocks if block.stretch is stretch]

    def following(self, stretch: Stretch, phase: str) -> Stretch | None:
        """The next stretch of `phase` after `stretch`."""
        later = self.stretches[self.stretches.index(stretch) + 1 :]
        return next((other for other in later if other.phase == phase), None)


def _active(part: Part) -> Iterator[tuple[int, int]]:
    for start, _, _, _, blocks in part.segments:
        address = start
        for size, requested, state in blocks:
            if state == "a":
                yield address, round_block(requested)
            address += size
