"""What a run does to memory, from load to the last step: plays of recorded tapes over frames.

A play runs a tape over a frame: the list of blocks of one layer in one micro-step. Hidden states and gradients cross
from frame to frame by links.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from memplan.architectures.builder import Weight
from memplan.memory.segment import Segment
from memplan.ops.tensor import AttentionCall, Tape

Link = tuple[int, int, int, int]
"""(to frame, to slot, from frame, from slot)"""

BEFORE_STEPS = ("load", "prepare")
"""Phases before the first step: a run's peaks are over its steps, as they are measured."""

EMPTY_CACHE: Tape = []
"""The play of `torch.cuda.empty_cache()`: this very list."""


@dataclass(slots=True)
class Play:
    phase: str
    step: int
    frame: int
    tape: Tape
    links: tuple[Link, ...] = ()
    loads: tuple[str, ...] = ()
    """Kernels (driver_addresses.py) that are called from here on."""


@dataclass
class Frame:
    """Slots of one piece in one micro-step, and what they are."""

    num_slots: int
    kinds: list[str]
    sizes: dict[int, int]


@dataclass(frozen=True, slots=True)
class Round:
    """The plays [begin, end) of one micro-step; `first_frame` is the first of its own frames."""

    begin: int
    end: int
    first_frame: int


@dataclass
class Program:
    plays: list[Play] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    """The micro-steps, in order."""
    weights: list[Weight] = field(default_factory=list)
    optimizer_state_bytes: int = 0
    managed_bytes: int = 0
    """Optimizer states in CUDA managed memory (paged optimizers), which no allocator sees."""
    attentions: list[AttentionCall | None] = field(default_factory=list)
    """What scaled_dot_product_attention runs in each layer; None where a layer has none."""

    @property
    def base_weights(self) -> list[Weight]:
        """The model's own parameters, tied ones once: no adapters and no buffers."""
        return [w for w in self.weights if w.kind == "weights" and not w.buffer]

    def frame(self, kinds: list[str], sizes: dict[int, int]) -> int:
        self.frames.append(Frame(len(kinds), kinds, sizes))
        return len(self.frames) - 1

    def frame_of(self, segment: Segment) -> int:
        return self.frame(segment.kinds, segment.sizes)

    def frame_for(self, tape: Tape, kind: str) -> int:
        """A frame for a tape that stands alone and whose slots are all of one kind."""
        num_slots = max((slot for slot, _ in tape), default=-1) + 1
        return self.frame([kind] * num_slots, {slot: size for slot, size in tape if size})

    def play(
        self, phase: str, step: int, frame: int, tape: Tape, links: Iterable[Link] = (), *, loads: Iterable[str] = ()
    ) -> None:
        """Appends a play; one that does nothing is left out where it does not begin a phase."""
        made = Play(phase, step, frame, tape, tuple(links), tuple(loads))
        if not tape and tape is not EMPTY_CACHE and not made.links and not made.loads and self.plays:
            before = self.plays[-1]
            if (before.phase, before.step) == (phase, step):
                return
        self.plays.append(made)
