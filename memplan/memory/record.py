"""Records the pieces of a run: embedding and each kind of layer; record_head.py has the last one."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Decoder
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.memory.segment import Recorder, Segment, finish, seed_gradients
from memplan.ops.autocast import LOW
from memplan.ops.autograd import expect, run_backward
from memplan.ops.checkpoint import checkpoint, checkpoint_reentrant
from memplan.ops.loss_liger import builds_logits
from memplan.ops.tensor import BorrowedStorage, Shape


@dataclass(frozen=True, slots=True)
class Stream:
    """Hidden states between two pieces."""

    shape: Shape
    dtype: DType
    requires_grad: bool
    is_leaf: bool = False


def record_embedding(decoder: Decoder, *, accumulating: bool) -> tuple[Segment, list[int]]:
    """The embedding and what is computed beside it; also the slots of the shared tensors."""
    config = decoder.config
    recorder = Recorder(autocast=config.autocast, device=decoder.device)
    m = recorder.machine
    build = Builder(decoder.spec, config, m)
    embeddings = decoder.embed(build)
    if accumulating:
        seed_gradients(build.parameters)
    shared_dtype = embeddings.dtype
    shared = Shared.made_by(decoder, m, shared_dtype, position_ids=build.position_ids)
    slots = [t.storage.slot for t in shared.tensors()]
    keeps_shared = tuple([t.storage.refs > 1 for t in shared.tensors()])
    if build.position_ids is not None and build.position_ids.storage.refs > 1:
        shared.position_ids = build.position_ids = None  # the embedding's backward is to free them
    out = decoder.enter(build, embeddings)
    del embeddings
    keeps_out = build.held is None or any(t.storage is out.storage for t in build.held)
    forward = m.new_tape()
    while build.held:
        build.held.pop(0)
    after_model = m.new_tape()
    m.cast_cache.clear()
    after = m.new_tape()
    _expect_tied(decoder, recorder, build)
    if out.requires_grad:
        run_backward(out, [recorder.port_dy(out)])
    backward = m.new_tape()
    leaf = out.node.leaf if decoder.leaf_embeddings and out.node is not None else None
    holds_out = leaf is not None and leaf.storage is out.storage
    out_requires_grad = out.requires_grad
    del leaf
    out.node = None
    after_loss = m.new_tape()
    tapes = forward, after, backward
    segment = finish("embedding", recorder, build, tapes, out=out, dx=None, keeps_shared=keeps_shared)
    segment.out_requires_grad = out_requires_grad
    segment.keeps_out, segment.holds_out, segment.after_model = keeps_out, holds_out, after_model
    segment.shared_dtype = shared_dtype
    segment.mask_slot = -1 if shared.mask is None else shared.mask.storage.slot
    segment.after_loss = [(segment.out_slot, 0), *after_loss] if holds_out else after_loss
    return segment, slots


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
    decoder: Decoder, kind: str, x_in: Stream, shared_dtype: DType, *, keeps_x: bool, accumulating: bool
) -> Segment:
    """One layer of `kind`. With `keeps_x` the model holds the hidden states that come in until its forward ends.

    `shared_dtype` is that of the embeddings: hidden states may be wider behind a layer with fp32 adapters.
    """
    config = decoder.config
    recorder = Recorder(autocast=config.autocast, device=decoder.device)
    m = recorder.machine
    build = Builder(decoder.spec, config, m)
    stand_ins = Shared.stand_ins(decoder, m, shared_dtype)
    borrowed = [t.storage for t in stand_ins.tensors() if isinstance(t.storage, BorrowedStorage)]
    given = decoder.shared_of(kind, stand_ins)
    layer = decoder.layer(build, kind, given)
    if accumulating:
        seed_gradients(build.parameters)
    x = recorder.port_x(x_in.shape, x_in.dtype, requires_grad=x_in.requires_grad, is_leaf=x_in.is_leaf)
    collector = x.node
    if not config.gradient_checkpointing:
        outputs = layer(x)
    elif config.reentrant:
        outputs = checkpoint_reentrant(layer, x)
    else:
        outputs = checkpoint(layer, x)
    y, beside = outputs if isinstance(outputs, tuple) else (outputs, None)
    del outputs
    # What holds shared tensors now is saved for backward, or a checkpoint, which keeps all its arguments.
    del stand_ins, given, layer
    keeps_shared = tuple([storage.refs > 0 for storage in borrowed])
    held = x if keeps_x else None
    del x
    forward = m.new_tape()
    del beside
    after_next = m.new_tape()
    m.cast_cache.clear()
    after = m.new_tape()
    del held
    dies_with_model = bool(m.new_tape())
    if y.requires_grad:
        run_backward(y, [recorder.port_dy(y)])
    dx = collector.meta if collector is not None else None
    shared_dies = tuple([storage.died_at if kept else -1 for storage, kept in zip(borrowed, keeps_shared, strict=True)])
    tapes = forward, after, m.new_tape()
    y.node = None  # the graph goes, and what contexts of autograd functions kept
    after_loss = m.new_tape()
    segment = finish(kind, recorder, build, tapes, out=y, dx=dx, keeps_shared=keeps_shared)
    segment.after_next, segment.after_loss, segment.shared_dies = after_next, after_loss, shared_dies
    if dies_with_model:
        segment.x_dies = "model"
    return segment
