"""What is alive at the peak, block by block, and which piece of the model made it."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.memory.program import Program


@dataclass(frozen=True, slots=True, eq=False)
class LiveBlock:
    """One block of device memory."""

    piece: str
    """`load`, `embedding`, `layer 0`, …, `head`, `optimizer`, or the phase that made it."""
    kind: str
    """The component it counts to."""
    num_bytes: int
    """In whole blocks of 512 bytes."""


def alive_at_peak(program: Program) -> list[LiveBlock]:
    """Every block alive when live tensors are at their highest, oldest first; they sum to the ledger's peak."""
    peak_play, peak_event = _peak(program)
    pieces = _pieces(program)
    frames: list[list[LiveBlock | None]] = [[None] * frame.num_slots for frame in program.frames]
    alive: dict[LiveBlock, None] = {}
    for index, play in enumerate(program.plays[: peak_play + 1]):
        for to_frame, to_slot, from_frame, from_slot in play.links:
            frames[to_frame][to_slot] = frames[from_frame][from_slot]
        slots, kinds = frames[play.frame], program.frames[play.frame].kinds
        piece = pieces.get(play.frame, play.phase)
        for slot, size in play.tape[: peak_event + 1] if index == peak_play else play.tape:
            if size:
                block = slots[slot] = LiveBlock(piece, kinds[slot], size)
                alive[block] = None
            else:
                freed = slots[slot]
                assert freed is not None, (piece, slot)
                del alive[freed]
                slots[slot] = None
    return list(alive)


def _peak(program: Program) -> tuple[int, int]:
    """Play and event after which most is alive, the first of equals."""
    live = highest = 0
    where = 0, -1
    for index, play in enumerate(program.plays):
        sizes = program.frames[play.frame].sizes
        for position, (slot, size) in enumerate(play.tape):
            live += size or -sizes[slot]
            if live > highest:
                highest, where = live, (index, position)
    return where


def _pieces(program: Program) -> dict[int, str]:
    """The name of each frame that is a piece of the model.

    A micro-step's frames come up in forward in the model's order: embedding, layers, head; loss ends the row.
    """
    pieces: dict[int, str] = {}
    row: list[int] = []
    for play in program.plays:
        if play.phase == "forward":
            stands_alone = {"workspaces", "inputs"}.issuperset(program.frames[play.frame].kinds)
            if play.frame not in pieces and play.frame not in row and not stands_alone:
                row.append(play.frame)
        elif row:
            pieces[row[0]], pieces[row[-1]] = "embedding", "head"
            pieces.update((frame, f"layer {number}") for number, frame in enumerate(row[1:-1]))
            row = []
    return pieces
