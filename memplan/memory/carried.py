"""What crosses from piece to piece beside the hidden states: layers' own embeddings, keys and values that they share.

One piece makes it, later ones read it, and their gradients meet before that piece's backward runs. A reader's
recording borrows the tensor and collects its gradient at a node of its own, on top of what later readers left, which
comes in by a port: as the engine's buffer of the maker's node has it.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.architectures.decoder import Decoder
from memplan.dtypes import DType
from memplan.memory.segment import NUM_PORTS, Carried, Recorder, Segment, collector
from memplan.ops.autograd import Node, expect
from memplan.ops.tensor import BorrowedStorage, Tensor


@dataclass(frozen=True, slots=True)
class Crossing:
    """What one layer reads and gives, and of that the names that later layers read too: their gradients come in."""

    reads: tuple[tuple[str, Carried], ...] = ()
    gives: tuple[str, ...] = ()
    read_later: frozenset[str] = frozenset()
    of_embedding: tuple[str, ...] = ()
    """What the embedding gives, in its order."""

    @property
    def names(self) -> tuple[str, ...]:
        return *(name for name, _ in self.reads), *self.gives


class Crossings:
    """The crossing of each layer of a model, in the order of the layers."""

    def __init__(self, decoder: Decoder, embedding: Segment) -> None:
        self._decoder = decoder
        self._of_embedding = tuple(embedding.carried)
        self.carried = dict(embedding.carried)
        """What the pieces so far give."""
        layers = range(decoder.spec.num_hidden_layers)
        self._last_reader = {name: index for index in layers for name in decoder.reads(index)}

    def of(self, index: int) -> Crossing:
        names, gives = self._decoder.reads(index), self._decoder.gives(index)
        return Crossing(
            tuple((name, self.carried[name]) for name in names),
            gives,
            frozenset(name for name in (*names, *gives) if self._last_reader.get(name, -1) > index),
            self._of_embedding,
        )


class Readings:
    """Stand-ins for what a layer reads, and the nodes where their gradients end up."""

    def __init__(self, recorder: Recorder, crossing: Crossing) -> None:
        self.recorder = recorder
        self.crossing = crossing
        self.tensors: dict[str, Tensor] = {}
        self.ports: dict[str, int] = {}
        self._storages: dict[str, BorrowedStorage] = {}
        self._collectors: dict[str, Node] = {}
        self._checkpoint = BorrowedStorage(recorder.machine, 0)
        for name, carried in crossing.reads:
            self._read(name, carried)

    def _read(self, name: str, carried: Carried) -> None:
        storage = BorrowedStorage(self.recorder.machine, 0)
        tensor = Tensor(storage, carried.shape, carried.dtype)
        storage.num_bytes = tensor.numel * carried.dtype.itemsize
        self.tensors[name], self._storages[name] = tensor, storage
        if carried.requires_grad:
            tensor.requires_grad = True
            tensor.node = self._collectors[name] = collector(tensor)
            self._expect(name, tensor)

    def _expect(self, name: str, tensor: Tensor) -> None:
        if name not in self.crossing.read_later or not tensor.requires_grad:
            return
        number = self.crossing.names.index(name)
        self.ports[name] = NUM_PORTS + number
        expect(tensor, [self.recorder.port_carried(number, tensor)])

    def hand_over(self) -> dict[str, Tensor]:
        """The stand-ins, and a handle that lives as long as what holds them: they are the caller's from here on."""
        handed, self.tensors = self.tensors, {}
        handed[""] = Tensor(self._checkpoint, (), DType.uint8)
        return handed

    def expect_gradients(self, given: dict[str, Tensor]) -> None:
        """Puts the later readers' gradients of what the layer gives where its own are added to them."""
        for name in self.crossing.gives:
            self._expect(name, given[name])

    def of_embedding(self) -> list[BorrowedStorage]:
        """The stand-ins for what the embedding gives."""
        return [self._storages[name] for name in self.crossing.of_embedding]

    def close(self, segment: Segment) -> None:
        """Says in `segment` what of this crosses its border."""
        segment.carried_ports = self.ports
        segment.checkpoint_dies = self._checkpoint.died_at
        for name, node in self._collectors.items():
            if node.meta is not None:
                segment.carried_gradients[name] = node.meta.storage.slot
