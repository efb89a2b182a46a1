"""Records the pieces of a run: embedding and each kind of layer; record_head.py has the last one."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Decoder
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.memory.carried import Crossing, Readings
from memplan.memory.segment import NUM_PORTS, Carried, Recorder, Segment, finish, seed_gradients
from memplan.ops.autocast import LOW
from memplan.ops.autograd import edge_of, expect, run_backward
from memplan.ops.checkpoint import checkpoint, checkpoint_reentrant
from memplan.ops.loss_liger import builds_logits
from memplan.ops.tensor import EXTERNAL, BorrowedStorage, Shape, Storage, Tensor


@dataclass(frozen=True, slots=True)
class Stream:
    """Hidden states between two pieces."""

    shape: Shape
    dtype: DType
    requires_grad: bool
    is_leaf: bool = False


def record_embedding(decoder: Decoder, *, accumulating: bool, dy_is_held: bool = False) -> tuple[Segment, list[int]]:
    """The embedding and what is computed beside it; also the slots of the shared tensors.

    `dy_is_held`: the first layer's checkpoint holds the gradient that comes in, and lets go of it with the loss.
    """
    config = decoder.config
    recorder = Recorder(autocast=config.autocast, device=decoder.device, num_carried=1)
    m = recorder.machine
    build = Builder(decoder.spec, config, m)
    embeddings = decoder.embed(build)
    shared_dtype = embeddings.dtype
    shared = Shared.made_by(decoder, m, shared_dtype, position_ids=build.position_ids)
    beside = list(build.carried.values())
    slots = [t.storage.slot for t in (*shared.tensors(), *beside)]
    keeps_shared = (*[t.storage.refs > 1 for t in shared.tensors()], *[False for _ in beside])
    if build.position_ids is not None and build.position_ids.storage.refs > 1:
        shared.position_ids = build.position_ids = None  # the embedding's backward is to free them
    out = decoder.enter(build, embeddings)
    del embeddings
    if accumulating:
        seed_gradients(build.parameters)
    keeps_out = build.held is None or any(t.storage is out.storage for t in build.held)
    forward = m.new_tape()
    rebound = {}
    for name, tensors in build.rebound.items():
        tensors.clear()
        rebound[name] = m.new_tape()
    while build.held:
        build.held.pop(0)
    after_model = m.new_tape()
    m.cast_cache.clear()
    after = m.new_tape()
    _expect_tied(decoder, recorder, build)
    carried = {name: Carried.of(tensor) for name, tensor in build.carried.items()}
    ports = {name: NUM_PORTS for name, tensor in carried.items() if tensor.requires_grad}
    assert len(carried) < 2, "one port for the gradient of what goes beside the hidden states"
    roots = beside[:1] if ports else []
    gradients = [recorder.port_carried(0, root) for root in roots]
    held_dy = None
    if out.requires_grad:
        roots.append(out)
        gradients.append(recorder.port_dy(out))
        held_dy = gradients[-1].detach() if dy_is_held else None
    out_requires_grad, out_slot = out.requires_grad, out.storage.slot
    holds_out = decoder.leaf_embeddings and _is_held_leaf(out)
    frees_out = bool(ports) and not holds_out and out.storage.refs > 1
    if frees_out:
        if out.requires_grad:
            expect(roots.pop(), [gradients.pop()])
        out = _outside(out)
    run_backward(roots, gradients)
    backward = m.new_tape()
    for root in (out, *roots):
        root.node = None
    after_loss = m.new_tape()
    tapes = forward, after, backward
    m.stop()
    del held_dy
    segment = finish("embedding", recorder, build, tapes, out=out, dx=None, keeps_shared=keeps_shared)
    segment.out_requires_grad = out_requires_grad
    if frees_out:
        segment.out_slot, segment.frees_out = out_slot, True
        segment.kinds[out_slot] = "activations"
    segment.carried, segment.carried_ports = carried, ports
    segment.keeps_out, segment.holds_out, segment.after_model = keeps_out, holds_out, after_model
    segment.rebound = rebound
    segment.shared_dtype = shared_dtype
    segment.mask_slot = -1 if shared.mask is None else shared.mask.storage.slot
    segment.after_loss = [(segment.out_slot, 0), *after_loss] if holds_out else after_loss
    return segment, slots


def _is_held_leaf(out: Tensor) -> bool:
    """Whether `out` is a leaf of the graph, which its accumulator holds."""
    edge = edge_of(out)
    leaf = None if edge is None else edge[0].leaf
    return leaf is not None and leaf.storage is out.storage


def _outside(out: Tensor) -> Tensor:
    """`out` without a handle on its storage, which the graph alone holds from then on."""
    seen = Tensor(Storage(out.machine, 0, slot=EXTERNAL), out.shape, out.dtype)
    seen.requires_grad = out.requires_grad
    return seen


def _expect_tied(decoder: Decoder, recorder: Recorder, build: Builder) -> None:
    """A tied embedding's gradient from the head is in autograd's buffer before the embedding's own arrives."""
    if not decoder.spec.tie_word_embeddings:
        return
    for table in build.parameters:
        if table.name == decoder.tied_name:
            gradient = recorder.port_tied(table)
            # Autocast's cast back to the weight's dtype is a tensor of its own, and so is what a fused loss makes;
            # otherwise it comes through `weight.t()`.
            cast = decoder.config.autocast and table.dtype is not LOW
            gradient.is_reshaped = not cast and builds_logits(decoder.config.loss, decoder.spec.model_type)
            expect(table, [gradient])
            del gradient


def record_layer(
    decoder: Decoder,
    kind: str,
    x_in: Stream,
    shared_dtype: DType,
    *,
    crossing: Crossing,
    keeps_x: bool,
    accumulating: bool,
) -> Segment:
    """One layer of `kind`. With `keeps_x` the model holds the hidden states that come in until its forward ends.

    `shared_dtype` is that of the embeddings: hidden states may be wider behind a layer with fp32 adapters.
    """
    config = decoder.config
    recorder = Recorder(autocast=config.autocast, device=decoder.device, num_carried=len(crossing.names))
    m = recorder.machine
    build = Builder(decoder.spec, config, m)
    stand_ins = Shared.stand_ins(decoder, m, shared_dtype)
    borrowed = [t.storage for t in stand_ins.tensors() if isinstance(t.storage, BorrowedStorage)]
    given = decoder.shared_of(kind, stand_ins)
    readings = Readings(recorder, crossing)
    build.carried, build.gives = readings.hand_over(), crossing.gives
    arguments = decoder.before_layer(build)
    layer = decoder.layer(build, kind, given)
    read, left = build.carried, build.given  # in the layer's hands now, which may be those of a checkpoint
    build.carried = {}
    if accumulating:
        seed_gradients(build.parameters)
    x = recorder.port_x(x_in.shape, x_in.dtype, requires_grad=x_in.requires_grad, is_leaf=x_in.is_leaf)
    collector = x.node
    if not config.gradient_checkpointing:
        outputs = layer(x)
    elif config.reentrant:
        outputs = checkpoint_reentrant(layer, x, read, arguments)
    else:
        outputs = checkpoint(layer, x)
    y, beside = outputs if isinstance(outputs, tuple) else (outputs, None)
    del outputs
    # What holds shared tensors now is saved for backward, or a checkpoint, which keeps all its arguments.
    del stand_ins, given, layer, read
    carried = {name: Carried.of(left[name]) for name in crossing.gives}
    keeps_shared = tuple([lent.refs > 0 for lent in (*borrowed, *readings.of_embedding())])
    held = x if keeps_x else None
    del x
    forward = m.new_tape()
    del beside
    after_next = m.new_tape()
    m.cast_cache.clear()
    after = m.new_tape()
    readings.expect_gradients(left)
    if not config.gradient_checkpointing:
        left.clear()
    after_model = m.new_tape()
    del held
    dies_with_model = bool(m.new_tape())
    if y.requires_grad:
        run_backward([y], [recorder.port_dy(y)])
    dx = collector.meta if collector is not None else None
    lenders = *borrowed, *readings.of_embedding()
    shared_dies = tuple([lent.died_at if kept else -1 for lent, kept in zip(lenders, keeps_shared, strict=True)])
    stack_keeps = tuple([lent.refs > 0 for lent in lenders])
    tapes = forward, after, m.new_tape()
    if not config.reentrant:
        left.clear()
    after_stack = m.new_tape()
    holds_dx = dx is not None and dx.storage.refs > 1
    y.node = None  # the graph goes, and what contexts of autograd functions kept
    left.clear()
    after_loss = m.new_tape()
    if dx is not None and holds_dx:
        after_loss.append((dx.storage.slot, 0))
    segment = finish(kind, recorder, build, tapes, out=y, dx=dx, keeps_shared=keeps_shared)
    readings.close(segment)
    segment.carried, segment.after_model, segment.after_stack = carried, after_model, after_stack
    segment.stack_keeps, segment.holds_dx = stack_keeps, holds_dx
    segment.after_next, segment.after_loss, segment.shared_dies = after_next, after_loss, shared_dies
    if dies_with_model:
        segment.x_dies = "model"
    return segment
