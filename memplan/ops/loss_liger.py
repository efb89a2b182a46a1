"""Liger's fused linear cross-entropy: logits in chunks of tokens, gradients made in forward.

Source: liger_kernel 0.8.5 ops/fused_linear_cross_entropy.py, transformers/model/loss_utils.py `LigerForCausalLMLoss`.
T tokens, H hidden, V vocabulary: a chunk has next_power_of_2(ceil(T / ceil(V / H))) tokens, so that its logits take
about as much as the hidden states. Saved: the gradients of the hidden states and, if it trains, of the weight.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autocast import LOW, low
from memplan.ops.autograd import Grads, Node, attach, record, save_result
from memplan.ops.loss import shifted_labels
from memplan.ops.pointwise import GradList, mul_number
from memplan.ops.tensor import Machine, Tensor

MODEL_TYPES = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "glm4",
        "gpt_oss",
        "llama",
        "llama4_text",
        "mistral",
        "mixtral",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "smollm3",
    }
)
"""Model types whose forward Liger replaces (transformers/monkey_patch.py `MODEL_TYPE_TO_APPLY_LIGER_FN`; granite is in
that table, but refuses this loss)."""


def builds_logits(loss: str, model_type: str) -> bool:
    """Whether the model computes all its logits; Liger leaves the forward of other model types as it is."""
    return loss == "full" or (loss == "liger" and model_type not in MODEL_TYPES)


def chunk_tokens(num_tokens: int, hidden_size: int, vocab_size: int) -> int:
    """Tokens of one chunk."""
    wanted = -(-num_tokens // -(-vocab_size // hidden_size))
    return min(1 << (wanted - 1).bit_length(), num_tokens)


def liger_causal_lm_loss(hidden_states: Tensor, weight: Tensor, *, num_items_in_batch: bool = False) -> Tensor:
    """LigerForCausalLMLoss: hidden_states [B, S, H], weight [V, H]; a scalar."""
    m = hidden_states.machine
    batch, tokens, hidden = hidden_states.shape
    labels, shift_labels = shifted_labels(m, batch, tokens)
    loss = _fused_linear_cross_entropy(hidden_states.view(batch * tokens, hidden), weight)
    del labels, shift_labels
    return mul_number(loss) if num_items_in_batch else loss


def _fused_linear_cross_entropy(x: Tensor, weight: Tensor) -> Tensor:
    """LigerFusedLinearCrossEntropyFunction.forward, reduced to a scalar."""
    m = x.machine
    num_tokens, hidden = x.shape
    vocab = weight.shape[0]
    chunk = chunk_tokens(num_tokens, hidden, vocab)
    node = record(m, _liger_backward, (x, weight), meta=None)
    with m.no_grad():
        grad_x = m.empty(x.shape, x.dtype)
        grad_weight = m.empty(weight.shape, weight.dtype) if weight.requires_grad else None
        losses = m.empty((num_tokens,), DType.fp32)
        valid = m.empty((num_tokens,), DType.bool8)
        count = m.empty((), DType.int64)
        del count
        # torch.mm(out=...) into one buffer where autocast would cast nothing, else a product a chunk
        in_place = x.dtype is weight.dtype and (not m.autocast or x.dtype is LOW)
        buffer = m.empty((chunk, vocab), x.dtype) if in_place else None
        for start in range(0, num_tokens, chunk):
            _chunk(m, x, weight, min(chunk, num_tokens - start), in_place, grad_weight)
        del buffer
        loss = m.empty((), DType.fp32)
    save_result(node, grad_x, *([] if grad_weight is None else [grad_weight]))
    del losses, valid, grad_x, grad_weight
    return attach(node, loss)


def _chunk(m: Machine, x: Tensor, weight: Tensor, num: int, in_place: bool, grad_weight: Tensor | None) -> None:
    hidden, vocab = x.shape[1], weight.shape[0]
    product = LOW if m.autocast else x.dtype
    if not in_place:
        rows = None if x.dtype is product else m.empty((num, hidden), product)
        # weight.t() is a view, so that autocast does not keep its cast
        table = None if weight.dtype is product else m.empty(weight.shape, product)
        logits = m.empty((num, vocab), product)
        m.calls("cublas")
        del rows, table
        table = low(weight)
        grad = m.empty((num, hidden), product)
        del grad, table, logits
    else:
        m.calls("cublas")
    if grad_weight is None:
        return
    if product is DType.fp32:
        summed = m.empty(weight.shape, DType.fp32)
        del summed
    elif x.dtype is not product:
        rows = m.empty((num, hidden), product)
        del rows


def _liger_backward(node: Node, grads: GradList) -> Grads:
    """The saved gradients themselves, scaled in place unless the incoming gradient is 1."""
    m = node.machine
    one, same = m.empty((), DType.fp32), m.empty((), DType.bool8)
    del one, same
    saved = [node.unpack(i).detach() for i in range(len(node.saved))]
    return [saved[0] if node.needs[0] else None, saved[1] if node.needs[1] else None]
