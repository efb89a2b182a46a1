"""The tapes that loading fills, over one frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from memplan.ops.tensor import Tape, round_block


@dataclass
class Loading:
    """Tapes over one frame: the base, what k-bit preparation casts, the adapters, what the first forward casts."""

    base: Tape = field(default_factory=list)
    casts: Tape = field(default_factory=list)
    adapters: Tape = field(default_factory=list)
    settles: Tape = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    num_before_kernels: int | None = None
    """Events of `base` up to the end of the first weight that is quantised, by kernels that are loaded then."""
    empties_cache: bool = False
    """prepare_model_for_kbit_training ends with torch.cuda.empty_cache() (PEFT 0.21.2 utils/other.py)."""

    def events(self) -> Iterator[tuple[int, int]]:
        return chain(self.base, self.casts, self.adapters, self.settles)

    def allocate(self, tape: Tape, num_bytes: int, kind: str = "temporaries") -> int:
        slot = len(self.kinds)
        self.kinds.append(kind)
        tape.append((slot, round_block(num_bytes)))
        return slot

    def append(self, tape: Tape, kinds: list[str]) -> None:
        """Plays `tape` at the end of the base, over slots of its own of these kinds."""
        first = len(self.kinds)
        self.kinds += kinds
        self.base += [(first + slot, size) for slot, size in tape]

    def free(self, tape: Tape, *slots: int) -> None:
        for slot in slots:
            tape.append((slot, 0))
