"""The causal language-model loss: full logits, TRL's chunks, Liger's fused kernel.

Full (transformers 5.17 loss/loss_utils.py `ForCausalLMLoss`), T tokens, V vocabulary: logits in the model's dtype,
their fp32 copy, fp32 log-probabilities (saved); backward: fp32 gradient of the log-probabilities, fp32 gradient of
the logits, its cast to the model's dtype.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autocast import high
from memplan.ops.autograd import Grads, Node, attach, record, save_result
from memplan.ops.pointwise import GradList, to
from memplan.ops.tensor import Tensor


def causal_lm_loss(logits: Tensor) -> Tensor:
    """ForCausalLMLoss(logits [B, S, V], labels): a scalar."""
    m = logits.machine
    batch, tokens, vocab = logits.shape
    logits = to(logits, DType.fp32)
    padded = m.empty((batch, tokens + 1), DType.int64)  # labels shifted by one (F.pad)
    # shift_labels = padded[..., 1:].contiguous() is a view of it for one sequence, a copy for more
    shift_labels = padded if batch == 1 else m.empty((batch, tokens), DType.int64)
    return cross_entropy(logits.view(batch * tokens, vocab), shift_labels)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """F.cross_entropy: log_softmax saves its result; nll_loss saves that, the labels and the weight's sum."""
    m = logits.machine
    log_probs = log_softmax(high(logits))
    node = record(m, _nll_backward, (log_probs,), (log_probs, labels), meta=log_probs.shape)
    loss, total_weight = m.empty((), DType.fp32), m.empty((), DType.fp32)
    attach(node, loss)
    save_result(node, total_weight)
    return loss


def log_softmax(x: Tensor) -> Tensor:
    m = x.machine
    node = record(m, _log_softmax_backward, (x,))
    result = attach(node, m.empty(x.shape, x.dtype))
    save_result(node, result)
    return result


def _log_softmax_backward(node: Node, grads: GradList) -> Grads:
    result = node.unpack()
    out = node.machine.empty(result.shape, result.dtype)
    del result
    return (out,)


def _nll_backward(node: Node, grads: GradList) -> Grads:
    saved = [node.unpack(i) for i in range(len(node.saved))]
    out = node.machine.empty(node.meta, DType.fp32)
    del saved
    return (out,)
