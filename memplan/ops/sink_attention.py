"""gpt_oss: eager attention with a sink, a learned score per head beside those of the keys.

Source: transformers 5.17 models/gpt_oss/modeling_gpt_oss.py `eager_attention_forward`, `_apply_rotary_emb`.
B batch, N query heads, S tokens, H head_dim; scores with sinks are [B, N, S, S + 1], in the stream's dtype d.

    saved for backward              bytes                   why
    q, repeated k                   2 B N S H d             factors of the scores
    indices of each row's maximum   8 B N S                 top-k of the combined scores
    probabilities with sinks        B N S (S + 1) d         softmax's result, of which the probabilities are a slice
    probabilities, repeated v       B N S S d + B N S H d   factors of the result; the first a copy if dropped or cast
All die with their nodes; scores, their sum with the mask and the concatenation are temporaries of B N S S d each.
"""

from __future__ import annotations

from memplan.ops.attention import repeat_kv
from memplan.ops.autograd import Grads, Node, attach, record, result_of, save_result
from memplan.ops.linear import bmm
from memplan.ops.pointwise import (
    GradList,
    add,
    cat_last,
    contiguous,
    dropout,
    incoming,
    mul,
    mul_number,
    same_size_backward,
    slice_last,
    split_last,
    to,
)
from memplan.ops.rows import topk
from memplan.ops.sdpa_math import softmax_backward
from memplan.ops.tensor import Shape, Tensor


def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *, mask: Tensor | None, num_groups: int, p: float
) -> tuple[Tensor, Tensor]:
    """[B, S, N, H] and the probabilities without the sink's, of which they are a view."""
    key_states = repeat_kv(k, num_groups)
    value_states = repeat_kv(v, num_groups)
    scores = (*q.shape[:3], k.shape[2])
    attn_weights = mul_number(bmm(q, key_states, scores))
    if mask is not None:
        attn_weights = add(attn_weights, mask)
    combined_logits = cat_last([attn_weights, _expanded(sinks, (*q.shape[:3], 1))])
    combined_logits = subtract(combined_logits, topk(combined_logits, 1)[0])  # max(dim=-1, keepdim=True).values
    probs = softmax_in_dtype(combined_logits)
    attn_weights = slice_last(probs, scores[-1])
    attn_weights = to(dropout(attn_weights, p), value_states.dtype)
    attn_output = _seen_by_heads(bmm(attn_weights, value_states, (*q.shape[:3], v.shape[3])))
    attn_output = contiguous(attn_output)
    return attn_output, attn_weights


def _expanded(sinks: Tensor, shape: Shape) -> Tensor:
    """sinks.reshape(1, -1, 1, 1).expand(...): a view; backward sums."""
    node = record(sinks.machine, _sum_backward, (sinks,), meta=sinks.shape)
    return attach(node, Tensor(sinks.storage, shape, sinks.dtype))


def _sum_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def softmax_in_dtype(x: Tensor) -> Tensor:
    """softmax(x, dtype=x.dtype): with the dtype given, autocast leaves it alone."""
    m = x.machine
    node = record(m, softmax_backward, (x,))
    result = result_of(node, m, x.shape, x.dtype)
    save_result(node, result)
    return result


def _seen_by_heads(x: Tensor) -> Tensor:
    """The product [B * N, S, H] as [B, N, S, H]; its gradient lies by tokens and is copied for several sequences."""
    if x.shape[0] == 1:
        return x
    node = record(x.machine, same_size_backward, (x,))
    return attach(node, Tensor(x.storage, x.shape, x.dtype))


def subtract(a: Tensor, b: Tensor) -> Tensor:
    """a - b; the gradient of b is a tensor of its own."""
    m = a.machine
    return result_of(record(m, _subtract_backward, (a, b)), m, a.shape, a.dtype)


def _subtract_backward(node: Node, grads: GradList) -> Grads:
    grad = incoming(grads)
    negated = node.machine.empty(grad.shape, grad.dtype) if node.needs[1] else None
    return (grad if node.needs[0] else None), negated


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[first * cos - second * sin, second * cos + first * sin] with cos, sin [1, 1, S, H / 2]."""
    half = x.shape[-1] // 2
    first_half, second_half = split_last(x, half, half)
    first = subtract(mul(first_half, cos), mul(second_half, sin))
    second = add(mul(second_half, cos), mul(first_half, sin))
    return cat_last([first, second])
