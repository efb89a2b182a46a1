"""Storages, tensors (handles on storages) and the machine that records their lives on a tape.

A tape is a list of `(slot, size)`: `size > 0` allocates that many bytes under the name `slot`, `size == 0`
frees it. Slots are dense integers, so that a tape can be replayed many times over plain lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from memplan.dtypes import DType
from memplan.ops.device import HOPPER, Device

if TYPE_CHECKING:
    from memplan.ops.autograd import Node

BLOCK_BYTES = 512
"""Every CUDA block is a multiple of this: `kMinBlockSize`, c10/cuda/CUDACachingAllocator.cpp."""

Shape = tuple[int, ...]
Tape = list[tuple[int, int]]
EXTERNAL = -1
"""Slot of a storage whose life the tape does not record (parameters, what outlives the segment)."""


def round_block(num_bytes: int) -> int:
    """Bytes that an allocation of `num_bytes` takes: `round_size`, c10/cuda/CUDACachingAllocator.cpp."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What scaled_dot_product_attention came down to: the tape shows its memory, this its arithmetic."""

    kernel: str
    """`cudnn`, `flash`, `efficient`, or `products`: matrix products, one after the other."""
    dtype: DType
    """In which it multiplies."""
    masked: bool
    """It takes a mask, and so computes what the mask hides too."""


class Machine:
    """Records one segment of a step: the tape, what each slot is for, and PyTorch's global modes."""

    __slots__ = (
        "attention", "autocast", "cast_cache", "device", "first_calls", "grad_enabled", "kind", "kinds", "num_slots",
        "pack", "seq", "tape",
    )  # fmt: skip

    def __init__(
        self,
        *,
        autocast: bool = False,
        num_ports: int = 0,
        kind: str = "temporaries",
        device: Device = HOPPER,
    ) -> None:
        self.device = device
        self.tape: Tape | None = []
        self.num_slots = num_ports
        self.kinds: list[str] = [kind] * num_ports
        self.kind = kind
        self.grad_enabled = True
        self.autocast = autocast
        self.cast_cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.pack: Callable[[Tensor], object] | None = None
        self.seq = 0
        self.first_calls: list[tuple[str, Tape, int]] = []
        """Where each library of matrix products first ran: its name, the tape, the number of events before."""
        self.attention: AttentionCall | None = None
        """The last one; None where attention is written out as matrix products."""

    def new_tape(self) -> Tape:
        """Ends the current tape and starts another; returns the ended one."""
        ended, self.tape = self.tape, []
        assert ended is not None
        return ended

    def calls(self, library: str) -> None:
        """A matrix product runs, its result is there: "cublas", and with a bias "cublaslt"
        (`addmm_out_cuda_impl`, aten/src/ATen/native/cuda/Blas.cpp). A thread's first one takes the library's workspace.
        """
        here = self.tape
        if here is None:
            return
        for name, tape, _ in self.first_calls:
            if tape is here and name == library:
                return
        self.first_calls.append((library, here, len(here)))

    def stop(self) -> None:
        """Nothing that dies from here on is recorded (the handles of the machine itself go away)."""
        self.tape = None

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """Storages made inside are of `kind` unless they are saved for backward."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def empty(self, shape: Shape, dtype: DType, *, kind: str | None = None) -> Tensor:
        """A new tensor of `shape` on a storage of its own."""
        return Tensor(Storage(self, prod(shape) * dtype.itemsize, kind), shape, dtype)

    def workspace(self, num_bytes: int) -> Tensor:
        """A buffer of `num_bytes` that a kernel asks the allocator for."""
        return Tensor(Storage(self, num_bytes), (num_bytes,), DType.uint8)


class Storage:
    """Bytes on the device. `refs` counts the handles; the last one frees it."""

    __slots__ = ("machine", "num_bytes", "refs", "slot")

    def __init__(self, machine: Machine, num_bytes: int, kind: str | None = None, *, slot: int | None = None) -> None:
        self.machine = machine
        self.refs = 0
        self.num_bytes = num_bytes
        if slot is not None:
            self.slot = slot
        elif num_bytes == 0:
            self.slot = EXTERNAL
        else:
            self.slot = machine.num_slots
            machine.num_slots += 1
            machine.kinds.append(kind or machine.kind)
            if machine.tape is not None:
                machine.tape.append((self.slot, round_block(num_bytes)))

    def release(self) -> None:
        machine = self.machine
        if self.slot >= 0 and machine.tape is not None:
            machine.tape.append((self.slot, 0))

    def mark(self, kind: str) -> None:
        """Says what this storage turned out to be for."""
        if self.slot >= 0:
            self.machine.kinds[self.slot] = kind


class BorrowedStorage(Storage):
    """Bytes that live outside of the tape; it notes where on the tape the last handle went."""

    __slots__ = ("died_at",)

    def __init__(self, machine: Machine, num_bytes: int) -> None:
        super().__init__(machine, num_bytes, slot=EXTERNAL)
        self.died_at = -1

    def release(self) -> None:
        if self.machine.tape is not None:
            self.died_at = len(self.machine.tape)


class Tensor:
    """A handle on a storage, as at::Tensor is. Views and saved tensors are further handles."""

    __slots__ = ("dtype", "is_leaf", "is_reshaped", "node", "node_output", "requires_grad", "shape", "storage")

    def __init__(self, storage: Storage, shape: Shape, dtype: DType) -> None:
        self.storage = storage
        storage.refs += 1
        self.shape = shape
        self.dtype = dtype
        self.node: Node | None = None
        self.node_output = 0
        self.requires_grad = False
        self.is_leaf = False
        """No parameter, but a leaf of the graph all the same: hidden states that were made to require a gradient."""
        self.is_reshaped = False
        """A gradient that came through a reshape: a view, to which CUDA builds do not add in place."""

    def __del__(self) -> None:
        storage = self.storage
        storage.refs -= 1
        if storage.refs == 0:
            storage.release()

    @property
    def machine(self) -> Machine:
        return self.storage.machine

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def detach(self) -> Tensor:
        """Another handle on the same storage, outside the graph."""
        return Tensor(self.storage, self.shape, self.dtype)

    def view(self, *shape: int) -> Tensor:
        """A view of the same storage in the same place of the graph.

        Gradients keep their size through a view, so that it needs no node of its own.
        """
        other = Tensor(self.storage, shape, self.dtype)
        other.node, other.node_output, other.requires_grad = self.node, self.node_output, self.requires_grad
        return other


class Parameter(Tensor):
    """A weight. Its storage is not on the tape: parameters are there before the step begins."""

    __slots__ = ("accumulator", "grad", "name", "slot_of_grad")

    def __init__(self, machine: Machine, name: str, shape: Shape, dtype: DType, *, trains: bool) -> None:
        super().__init__(Storage(machine, prod(shape) * dtype.itemsize, slot=EXTERNAL), shape, dtype)
        self.name = name
        self.requires_grad = trains
        self.grad: Tensor | None = None
        self.accumulator: Node | None = None
