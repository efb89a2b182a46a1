"""The causal language-model loss over full logits, and the scalars that a loss goes through.

Source: transformers 5.17 loss/loss_utils.py `ForCausalLMLoss`. T tokens, V vocabulary: logits in the model's dtype,
their fp32 copy, fp32 log-probabilities (saved); backward: fp32 gradient of the log-probabilities, fp32 gradient of
the logits, its cast to the model's dtype.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autocast import high
from memplan.ops.autograd import Grads, Node, attach, record, save_result
from memplan.ops.pointwise import GradList, mul_number, same_size_backward, to
from memplan.ops.tensor import Machine, Tensor


def causal_lm_loss(logits: Tensor, *, num_items_in_batch: bool = False) -> Tensor:
    """ForCausalLMLoss(logits [B, S, V], labels): a scalar; with `num_items_in_batch` a sum divided by it."""
    m = logits.machine
    batch, tokens, vocab = logits.shape
    logits = to(logits, DType.fp32)
    labels, shift_labels = shifted_labels(m, batch, tokens)
    loss = cross_entropy(logits.view(batch * tokens, vocab), shift_labels)
    if num_items_in_batch:
        loss = mul_number(loss)
    del labels, logits  # only now: they are the function's locals
    return loss


def shifted_labels(m: Machine, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """`labels` padded by one, and the labels that follow each token: a view of it for one sequence, a copy for more."""
    padded = m.empty((batch, tokens + 1), DType.int64)
    return padded, padded if batch == 1 else m.empty((batch, tokens), DType.int64)


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


def scale_in_place(x: Tensor) -> Tensor:
    """x *= number."""
    m = x.machine
    node = record(m, same_size_backward, (x,))
    return attach(node, Tensor(x.storage, x.shape, x.dtype))


def div(x: Tensor, divisor: Tensor) -> Tensor:
    """x / divisor, a scalar on the device that needs no gradient and is saved."""
    m = x.machine
    node = record(m, same_size_backward, (x,), (divisor,))
    return attach(node, m.empty(x.shape, x.dtype))


def total(x: Tensor) -> Tensor:
    """x.sum(): a scalar; backward expands its gradient, a view."""
    m = x.machine
    node = record(m, _total_backward, (x,), meta=x.shape)
    return attach(node, m.empty((), DType.fp32 if x.dtype.is_floating else DType.int64))


def _total_backward(node: Node, grads: GradList) -> Grads:
    grad = grads[0]
    assert grad is not None
    return (Tensor(grad.storage, node.meta, grad.dtype),)
