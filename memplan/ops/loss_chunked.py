"""TRL's fused output head: the loss in tiles of 4096 tokens by 32768 vocabulary entries, no logits kept.

Source: TRL 1.16 trainer/utils.py `add_fused_lm_head`, kernels/chunked_logprob.py `ChunkedLogProbFunction`.
N = labelled tokens, H hidden, V vocabulary, C = 32768 columns of the tile buffer (also where V is smaller). Forward
saves the selected hidden states [N, H] and per-token fp32 statistics, and recomputes each tile in backward, where the
gradients of the hidden states and of the weight are collected in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.ops.autocast import LOW
from memplan.ops.autograd import Grads, Node, attach, record, save_result
from memplan.ops.loss import div, total
from memplan.ops.masking import count_true, masked_scatter, select_rows, slice_tokens
from memplan.ops.pointwise import GradList, neg
from memplan.ops.tensor import EXTERNAL, Machine, Storage, Tensor

TOKEN_CHUNK_SIZE = 4096
CHUNK_SIZE = 32768


@dataclass(slots=True)
class FusedOutput:
    """FusedCausalLMOutput: per-token fields are [B, S - 1]."""

    loss: Tensor
    log_probs: Tensor
    entropy: Tensor | None
    is_top1: Tensor | None
    label_mask: Tensor


def fused_lm_head(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *, num_labels: int, with_metrics: bool
) -> FusedOutput:
    """The model's forward after the final norm: hidden_states [B, S, H], weight [V, H], `num_labels` labels to score.

    `with_metrics` asks for the entropy and the top-1 hits too, as SFTTrainer does.
    """
    m = hidden_states.machine
    batch, tokens, _ = hidden_states.shape
    hidden_states = slice_tokens(hidden_states, tokens - 1)
    mask = m.empty((batch, tokens - 1), DType.bool8)
    selected = select_rows(hidden_states, mask, num_labels)
    labels = Tensor(Storage(m, batch * (tokens - 1) * 8, slot=EXTERNAL), (batch, tokens - 1), DType.int64)
    targets = select_rows(labels, mask, num_labels)
    scored = _chunked_log_probs(selected, weight, bias, targets, with_metrics=with_metrics)
    del selected, targets
    spread = [masked_scatter(mask, x) for x in scored]
    del scored
    loss = _mean_loss(spread[0], mask)
    return FusedOutput(loss, spread[0], spread[1] if with_metrics else None, spread[2] if with_metrics else None, mask)


def _mean_loss(log_probs: Tensor, mask: Tensor) -> Tensor:
    """-log_probs.sum() / mask.sum().clamp(min=1)"""
    m = mask.machine
    summed = neg(total(log_probs))
    counted = count_true(mask)
    clamped = m.empty((), DType.int64)
    del counted
    return div(summed, clamped)


@dataclass(slots=True)
class _Scoring:
    """What backward must know of the forward call."""

    compute_dtype: DType
    weight_dtype: DType
    vocab: int
    has_bias: bool


def _chunked_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, with_metrics: bool
) -> list[Tensor]:
    """ChunkedLogProbFunction.forward: [N] log-probabilities, and entropy and top-1 hits if asked for."""
    m = hidden.machine
    num, vocab = hidden.shape[0], weight.shape[0]
    compute = LOW if m.autocast else hidden.dtype
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    node = record(m, _chunked_backward, inputs, meta=_Scoring(compute, weight.dtype, vocab, bias is not None))
    running_max, sum_exp, x_sum_exp, *others, target_logit = [m.empty((num,), DType.fp32) for _ in range(7)]
    buffer = _tile_buffer(m, num, compute)
    chunk = None
    for num_tokens in _spans(num, TOKEN_CHUNK_SIZE):
        chunk = _cast(m, (num_tokens, hidden.shape[1]), hidden.dtype, compute)
        for width in _spans(vocab, CHUNK_SIZE):
            piece = _cast(m, (width, hidden.shape[1]), weight.dtype, compute)
            m.calls("cublas")
            del piece
            if bias is not None:
                piece = _cast(m, (width,), bias.dtype, compute)
                del piece
    log = m.empty((num,), DType.fp32)
    log_z = m.empty((num,), DType.fp32)
    del log
    results = [m.empty((num,), DType.fp32)]
    if with_metrics:
        ratio = m.empty((num,), DType.fp32)
        results.append(m.empty((num,), DType.fp32))
        del ratio
        reaches, exceeds = m.empty((num,), DType.bool8), m.empty((num,), DType.bool8)
        results.append(m.empty((num,), DType.bool8))
        del reaches, exceeds
    for output, result in enumerate(results[:2]):
        attach(node, result, output)
    save_result(node, hidden, weight, targets, log_z, results[1] if with_metrics else log_z)
    del running_max, sum_exp, x_sum_exp, others, target_logit, buffer, chunk
    return results


def _chunked_backward(node: Node, grads: GradList) -> Grads:
    m, call = node.machine, node.meta
    saved = [node.unpack(i) for i in range(len(node.saved))]
    hidden, weight = saved[0], saved[1]
    num, width_of_row = hidden.shape
    compute: DType = call.compute_dtype
    for_hidden = m.empty(hidden.shape, DType.fp32) if node.needs[0] else None
    for_weight = m.empty(weight.shape, DType.fp32) if node.needs[1] else None
    for_bias = m.empty((call.vocab,), DType.fp32) if call.has_bias and node.needs[2] else None
    buffer = _tile_buffer(m, num, compute)
    chunk = piece = None  # Python lets go of the old value only after the new one is there
    for num_tokens in _spans(num, TOKEN_CHUNK_SIZE):
        chunk = _cast(m, (num_tokens, width_of_row), hidden.dtype, compute)
        for width in _spans(call.vocab, CHUNK_SIZE):
            piece = _cast(m, (width, width_of_row), weight.dtype, compute)
            m.calls("cublas")
            if for_bias is not None:
                summed = m.empty((width,), DType.fp32)
                del summed
    outputs: list[Tensor | None] = [None if for_hidden is None else _as(for_hidden, hidden.dtype)]
    outputs.append(None if for_weight is None else _as(for_weight, weight.dtype))
    if call.has_bias:
        outputs.append(None if for_bias is None else _as(for_bias, weight.dtype))
    del for_hidden, for_weight, for_bias, buffer, chunk, piece
    return outputs


def _tile_buffer(m: Machine, num: int, dtype: DType) -> Tensor:
    return m.empty((min(num, TOKEN_CHUNK_SIZE), CHUNK_SIZE), dtype)


def _spans(total_size: int, chunk: int) -> list[int]:
    return [min(chunk, total_size - start) for start in range(0, total_size, chunk)]


def _cast(m: Machine, shape: tuple[int, ...], dtype: DType, wanted: DType) -> Tensor | None:
    """A slice `.to(wanted)`: None where that is the slice itself."""
    return None if dtype is wanted else m.empty(shape, wanted)


def _as(x: Tensor, dtype: DType) -> Tensor:
    return x if x.dtype is dtype else x.machine.empty(x.shape, dtype)
