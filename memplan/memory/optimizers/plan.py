"""What one optimizer does to memory: tapes for its making, its first step and every later one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from memplan.dtypes import DType
from memplan.ops.device import HOPPER, Device
from memplan.ops.reduction import Scratch, reduction_scratch
from memplan.ops.tensor import Shape, Tape, round_block


class Param(NamedTuple):
    """A trained tensor as the optimizer sees it."""

    numel: int
    shape: Shape
    dtype: DType
    in_fp32: bool = False
    """An 8-bit optimizer is told to keep this one's states in fp32."""

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize


Group = list[Param]


@dataclass
class Plan:
    """Tapes of one optimizer over all parameters; they share their slots."""

    device: Device = HOPPER
    clip: Tape = field(default_factory=list)
    """clip_grad_norm_; its slots are its own."""
    made: Tape = field(default_factory=list)
    """The constructor."""
    first: Tape = field(default_factory=list)
    """The first step, which makes the states."""
    later: Tape = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    managed_bytes: int = 0
    """States in CUDA managed memory (paged optimizers): no allocator sees them, the driver pages them in and out."""

    @property
    def state_bytes(self) -> int:
        """Bytes that the states take on the device, in whole blocks."""
        return sum(size for slot, size in chain(self.made, self.first) if self.kinds[slot] == "optimizer_states")

    def slot(self, kind: str) -> int:
        self.kinds.append(kind)
        return len(self.kinds) - 1

    def state(self, num_bytes: int, *, at_once: bool = False) -> int:
        """A tensor that stays, from the first step on, or `at_once` from the constructor."""
        slot = self.slot("optimizer_states")
        (self.made if at_once else self.first).append((slot, round_block(num_bytes)))
        return slot

    def hold(self, num_bytes: int) -> int:
        """A temporary of every step; `release` its slot."""
        slot = self.slot("temporaries")
        size = round_block(num_bytes)
        self.first.append((slot, size))
        self.later.append((slot, size))
        return slot

    def release(self, *slots: int) -> None:
        for slot in slots:
            self.first.append((slot, 0))
            self.later.append((slot, 0))

    def replace(self, slot: int | None) -> int:
        """A small state that every step makes anew: the old one goes, the new one stays."""
        fresh = self.slot("optimizer_states") if slot is None else slot
        self.first.append((fresh, round_block(4)))
        self.later += [(fresh, 0), (fresh, round_block(4))]
        return fresh

    def reduce(self, num_reduced: int, num_kept: int, *, reduces_last: bool) -> None:
        """What a reduction over fp32 takes while it runs."""
        self.use(reduction_scratch(num_reduced, num_kept, DType.fp32, self.device, reduces_last=reduces_last))

    def use(self, scratch: Scratch) -> None:
        for sizes in scratch.passes:
            self.release(*[self.hold(size) for size in sizes])


def by_dtype(params: Iterable[Param]) -> list[Group]:
    """Groups as foreach functions get them (torch/utils/_foreach_utils.py).

    They come out of a std::unordered_map, whose newest entry is its first: the last dtype seen leads.
    """
    groups: dict[DType, Group] = {}
    for p in params:
        groups.setdefault(p.dtype, []).append(p)
    return list(reversed(groups.values()))
