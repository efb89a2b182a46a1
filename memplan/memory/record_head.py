"""Records the last piece of a run: final norm, output head and loss, in the order in which each stack lets go of them.

torch: the loop keeps the loss alone (calibration/loop.py). trainer: transformers 5.17 trainer.py `training_step`,
`compute_loss`; accelerate 1.15 utils/operations.py `convert_outputs_to_fp32`, accelerator.py `backward`. trl: TRL 1.16
trainer/sft_trainer.py `compute_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Decoder
from memplan.architectures.moe_warnings import has_router_loss
from memplan.dtypes import DType
from memplan.errors import MemplanError
from memplan.memory.record import Stream
from memplan.memory.segment import PORT_X, Recorder, Segment, finish, seed_gradients
from memplan.ops.autograd import run_backward
from memplan.ops.linear import Linear
from memplan.ops.loss import causal_lm_loss, div, scale_in_place, total
from memplan.ops.loss_chunked import FusedOutput, fused_lm_head
from memplan.ops.loss_liger import builds_logits, liger_causal_lm_loss
from memplan.ops.masking import count_true
from memplan.ops.pointwise import mul_number, neg, to
from memplan.ops.tensor import Tape, Tensor


@dataclass
class Head:
    """The last piece: `segment.forward` is the final norm, `loss` the head and the loss after it, `outputs` what the
    stack does with them once the model's forward, and with it autocast, is left."""

    segment: Segment
    loss: Tape
    outputs: Tape
    after_backward: Tape
    """What dies when `backward()` returns."""


@dataclass
class _Outputs:
    """What the model returns."""

    loss: Tensor
    logits: Tensor | None = None
    fused: FusedOutput | None = None


def record_head(decoder: Decoder, x_in: Stream, *, accumulating: bool) -> Head:
    """Final norm, output head and loss.

    Raises:
        MemplanError: a loss that the model, or what stands at its output head, does not allow.
    """
    config = decoder.config
    recorder = Recorder(autocast=config.autocast, device=decoder.device)
    m = recorder.machine
    build = Builder(decoder.spec, config, m)
    norm = decoder.final_norm(build)
    decoder.buffers(build)
    lm_head = decoder.head(build)
    if accumulating:
        seed_gradients([p for p in build.parameters if p.name != decoder.tied_name])
    x = recorder.port_x(x_in.shape, x_in.dtype, requires_grad=x_in.requires_grad)
    collector = x.node
    hidden_states = norm(x)
    del x
    forward = m.new_tape()
    while build.held:
        build.held.pop(0)
    after_model = m.new_tape()
    with m.allocating("loss"):
        outputs = _model_outputs(decoder, lm_head, hidden_states)
        del hidden_states
        if config.stack == "torch":
            outputs.logits = outputs.fused = None
        loss_tape = m.new_tape()
        m.cast_cache.clear()
        after = m.new_tape()
        m.autocast = False
        loss = _stack_loss(decoder, outputs)
        del outputs
        outputs_tape = m.new_tape()
        scaled = loss if config.stack == "torch" else mul_number(loss)  # accelerator.backward divides by 1
        ones = m.empty((), DType.fp32)  # torch.autograd.backward holds it until it returns
        run_backward([scaled], [ones.detach()])
        backward = m.new_tape()
        del ones, scaled
        after_backward = m.new_tape()
    dx = collector.meta if collector is not None else None
    # the scalar itself dies when the loop lets go of it
    segment = finish("head", recorder, build, (forward, after, backward), out=None, dx=dx)
    for slot, size in (*loss_tape, *outputs_tape):
        if size:
            segment.sizes[slot] = size
    segment.after_model, segment.rebinds = after_model, build.rebinds
    if (PORT_X, 0) in after_model:
        segment.x_dies = "model"
    segment.out_slot = loss.storage.slot
    for name, slot in segment.gradients:
        if name == decoder.tied_name:
            segment.tied_slot = slot
    segment.gradients = [(name, slot) for name, slot in segment.gradients if name != decoder.tied_name]
    return Head(segment, loss_tape, outputs_tape, after_backward)


def _model_outputs(decoder: Decoder, lm_head: object, hidden_states: Tensor) -> _Outputs:
    """The rest of the model's forward, under autocast."""
    config, spec = decoder.config, decoder.spec
    counted = config.stack != "torch"  # the trainers pass num_items_in_batch
    if config.loss == "chunked":
        weight, bias = _weight_of(lm_head, config.stack)
        batch, tokens = decoder.batch
        fused = fused_lm_head(
            hidden_states, weight, bias, num_labels=batch * (tokens - 1), with_metrics=config.stack == "trl"
        )
        return _Outputs(fused.loss, fused=fused)
    if not builds_logits(config.loss, spec.model_type):
        return _Outputs(
            liger_causal_lm_loss(hidden_states, _weight_of(lm_head, config.stack)[0], num_items_in_batch=counted)
        )
    assert callable(lm_head)
    logits = decoder.after_head(lm_head(hidden_states))
    return _Outputs(causal_lm_loss(logits, num_items_in_batch=counted), logits)


def _weight_of(lm_head: object, stack: str) -> tuple[Tensor, Tensor | None]:
    if not isinstance(lm_head, Linear):
        full = "take stack `torch` or `trainer`" if stack == "trl" else "take `loss=full`"
        raise MemplanError(
            "this loss reads the weight of `lm_head` itself, so an adapter on it would not be trained",
            hints=[f"leave `lm_head` out of `target_modules`, or {full}; `modules_to_save` may name it"],
        )
    return lm_head.weight, lm_head.bias


def _stack_loss(decoder: Decoder, outputs: _Outputs) -> Tensor:
    """What the training loop makes of the outputs before backward."""
    config = decoder.config
    if config.stack == "torch":
        steps = config.gradient_accumulation_steps
        return mul_number(outputs.loss) if steps > 1 else outputs.loss
    if config.autocast and outputs.logits is not None:
        outputs.logits = to(outputs.logits, DType.fp32)
    if config.stack == "trl" and outputs.fused is not None:
        return _sft_loss(outputs.fused, decoder)
    return scale_in_place(outputs.loss)  # loss *= num_processes


def _sft_loss(fused: FusedOutput, decoder: Decoder) -> Tensor:
    """SFTTrainer.compute_loss: the mean over the labelled tokens, then entropy and token accuracy."""
    m = fused.loss.machine
    per_token_loss = neg(fused.log_probs)
    summed = total(per_token_loss)
    loss = div(summed, m.empty((), DType.int64))  # num_items_in_batch.clamp(min=1)
    del summed
    loss = mul_number(loss)  # times num_processes
    if has_router_loss(decoder.spec, decoder.config):
        # load_balancing_loss_func keeps the attention mask in fp32; the layers keep their routing
        loss = div(loss, m.empty(decoder.batch, DType.fp32))
    assert fused.entropy is not None and fused.is_top1 is not None
    sums = [_gathered(count_true(fused.label_mask))]
    sums.append(_gathered(total(fused.entropy.detach())))
    sums.append(_gathered(count_true(fused.is_top1)))
    for _ in ("entropy", "mean_token_accuracy"):
        m.empty((), DType.bool8)  # num_valid > 0
        m.empty((), DType.fp32)
    _gathered(m.empty((), DType.int64))  # attention_mask.sum()
    return loss


def _gathered(x: Tensor) -> Tensor:
    """The sum over one process of what was gathered from it."""
    return x.machine.empty((), x.dtype)
