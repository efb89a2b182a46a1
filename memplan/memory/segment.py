"""One piece of the model (embedding, a kind of layer, the head), recorded forward and backward on a machine of its own.

Three storages cross a segment's border and have fixed slots: the hidden states that come in (`PORT_X`), the
gradient of those that go out (`PORT_DY`), and the output head's gradient of a tied embedding (`PORT_TIED`). Their
bytes are allocated by a neighbour; a segment only frees them.
Layers of one kind share one recording: the step replays it with each layer's own blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from memplan.architectures.builder import Builder, Weight
from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node
from memplan.ops.device import Device
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.tensor import AttentionCall, Machine, Parameter, Shape, Storage, Tape, Tensor

PORT_X = 0
PORT_DY = 1
PORT_TIED = 2
NUM_PORTS = 3


@dataclass
class Segment:
    """The tapes of one piece and what the composition must know of it."""

    name: str
    forward: Tape
    after_forward: Tape
    """What dies when the model's forward returns: autocast's cast weights."""
    backward: Tape
    kinds: list[str]
    """What each slot is for."""
    weights: list[Weight]
    gradients: list[tuple[str, int]]
    """Name and slot of each trained weight's gradient, in the order of the weights."""
    out_slot: int = -1
    """Slot of the hidden states that go out."""
    dx_slot: int = -1
    """Slot of the gradient that goes to the piece before; -1 for none."""
    out: tuple[Shape, DType] = ((), DType.fp32)
    out_requires_grad: bool = False
    x_dies: str = ""
    """Where this segment lets go of what came in: "forward", "model" (when its forward returns) or "backward"."""
    tied_slot: int = -1
    """Slot of the gradient of the tied embedding, which waits here for the embedding's own."""
    keeps_out: bool = False
    """The model's forward has what goes out in a local."""
    holds_out: bool = False
    """What goes out lives as long as the loss: embeddings made to require a gradient."""
    after_next: Tape = field(default_factory=list)
    """What dies once the next layer has returned."""
    after_model: Tape = field(default_factory=list)
    """What dies when the model's forward returns: its locals."""
    rebound: dict[str, Tape] = field(default_factory=dict)
    """Of the embedding: what dies where the model's forward rebinds each of those of its locals behind the layers."""
    rebinds: dict[str, int] = field(default_factory=dict)
    """Of the head: where on its forward tape that is."""
    after_loss: Tape = field(default_factory=list)
    """What dies with the loss and its graph."""
    shared_dtype: DType = DType.fp32
    """dtype of the embeddings, for which masks and rotary tables are made."""
    mask_slot: int = -1
    """Slot of the attention mask among what the embedding's piece computes."""
    carried: dict[str, Carried] = field(default_factory=dict)
    """What it gives later pieces beside the hidden states."""
    carried_slots: dict[str, int] = field(default_factory=dict)
    """Slot of each of these, where the embedding gives it."""
    carried_ports: dict[str, int] = field(default_factory=dict)
    """Slots by which gradients of what is carried come in."""
    carried_gradients: dict[str, int] = field(default_factory=dict)
    """Slots in which they go on to the pieces before."""
    after_stack: Tape = field(default_factory=list)
    """What checkpoints share and let go of with the last of them, that of the first layer."""
    stack_keeps: tuple[bool, ...] = ()
    """Which of the shared tensors that holds."""
    holds_dx: bool = False
    """The gradient that goes on is held until the loss goes, with the graph of what reentrant checkpoints share."""
    checkpoint_dies: int = -1
    """Where on its backward tape the layer's own checkpoint goes."""
    frees_out: bool = False
    """What goes out is freed by this piece's backward, not by that of the next: its graph keeps it."""
    shared_dies: tuple[int, ...] = ()
    """Where on its backward tape the last handle on each of those goes; -1 if not there."""
    keeps_shared: tuple[bool, ...] = ()
    """Which of the shared tensors (positions, rotary tables, mask) are needed until its backward is over."""
    sizes: dict[int, int] = field(default_factory=dict)
    """Bytes of every slot, ports included."""
    first_calls: list[tuple[str, Tape, int]] = field(default_factory=list)
    """Where on each of its tapes cuBLAS and cuBLASLt first run."""
    attention: AttentionCall | None = None
    """What a layer's scaled_dot_product_attention runs; None where it has none."""

    @cached_property
    def zero_grad(self) -> Tape:
        """What `zero_grad` lets go of."""
        return [(slot, 0) for _, slot in self.gradients]


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor that crosses from a piece to later ones beside the hidden states (carried.py)."""

    shape: Shape
    dtype: DType
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Carried:
        return cls(tensor.shape, tensor.dtype, tensor.requires_grad)


class Recorder:
    """A machine with the ports in place, for the recording of one segment."""

    def __init__(self, *, autocast: bool, device: Device, num_carried: int = 0) -> None:
        self.machine = Machine(autocast=autocast, num_ports=NUM_PORTS + num_carried, device=device)
        self.port_sizes: dict[int, int] = {}

    def port_x(self, shape: Shape, dtype: DType, *, requires_grad: bool, is_leaf: bool = False) -> Tensor:
        """The hidden states that come in; their gradient is collected at a node of their own."""
        x = self._port(PORT_X, shape, dtype)
        x.is_leaf = is_leaf
        self.machine.kinds[PORT_X] = "activations"
        if requires_grad:
            x.requires_grad = True
            x.node = collector(x)
        return x

    def port_dy(self, like: Tensor) -> Tensor:
        return self._port(PORT_DY, like.shape, like.dtype)

    def port_tied(self, like: Tensor) -> Tensor:
        self.machine.kinds[PORT_TIED] = "gradients"
        return self._port(PORT_TIED, like.shape, like.dtype)

    def port_carried(self, number: int, like: Tensor) -> Tensor:
        """The gradient that later readers of the carried tensor number `number` of this piece left."""
        return self._port(NUM_PORTS + number, like.shape, like.dtype)

    def _port(self, slot: int, shape: Shape, dtype: DType) -> Tensor:
        storage = Storage(self.machine, 0, slot=slot)
        tensor = Tensor(storage, shape, dtype)
        storage.num_bytes = tensor.numel * dtype.itemsize
        self.port_sizes[slot] = storage.num_bytes
        return tensor


def collector(of: Tensor) -> Node:
    """A node where the gradient of what comes in ends up, as its `meta`: after every other node of the segment."""
    node = Node(of.machine, _collect, [])
    node.order = 2**62
    node.likes.append((of.shape, of.dtype))
    return node


def _collect(node: Node, grads: GradList) -> Grads:
    node.meta = incoming(grads).detach()
    return ()


def seed_gradients(parameters: list[Parameter]) -> None:
    """Gives every parameter a gradient from an earlier micro-batch, so that backward adds to it in place."""
    for p in parameters:
        p.grad = Tensor(Storage(p.machine, 0, slot=-1), p.shape, p.dtype)


def gradient_slots(parameters: list[Parameter]) -> list[tuple[str, int]]:
    return [(p.name, p.grad.storage.slot) for p in parameters if p.grad is not None and p.grad.storage.slot >= 0]


def finish(
    name: str,
    recorder: Recorder,
    build: Builder,
    tapes: tuple[Tape, Tape, Tape],
    *,
    out: Tensor | None,
    dx: Tensor | None,
    keeps_shared: tuple[bool, ...] = (),
) -> Segment:
    """Closes the recording. `out` and `dx` are still held by the caller; nothing that dies now is on a tape."""
    machine = recorder.machine
    machine.stop()
    forward, after_forward, backward = tapes
    kinds = machine.kinds
    sizes = dict(recorder.port_sizes)
    for tape in tapes:
        for slot, size in tape:
            if size:
                sizes[slot] = size
    for port, size in recorder.port_sizes.items():
        sizes[port] = -(-size // 512) * 512
    if out is not None:
        kinds[out.storage.slot] = "activations"
    if dx is not None and dx.storage.slot >= 0:
        kinds[dx.storage.slot] = "temporaries"
    kinds[PORT_DY] = "temporaries"  # counted as its maker counts it, even where it becomes the embeddings' gradient
    freed_forward = any(slot == PORT_X and size == 0 for slot, size in forward)
    return Segment(
        name=name,
        forward=forward,
        after_forward=after_forward,
        backward=backward,
        kinds=kinds,
        weights=build.weights,
        gradients=gradient_slots(build.parameters),
        out_slot=-1 if out is None else out.storage.slot,
        dx_slot=-1 if dx is None else dx.storage.slot,
        out=((), DType.fp32) if out is None else (out.shape, out.dtype),
        out_requires_grad=out is not None and out.requires_grad,
        x_dies="forward" if freed_forward else "backward",
        keeps_shared=keeps_shared,
        sizes=sizes,
        first_calls=machine.first_calls,
        attention=machine.attention,
    )
