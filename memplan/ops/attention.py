"""Attention: the eager matrix products, and the fused kernels behind scaled_dot_product_attention.

Shapes: B batch, N query heads, K key-value heads, S tokens, H head_dim; q [B, N, S, H], k and v [B, K, S, H].

Saved until the op's backward has run, with d bytes an element (cudnn.py, flash.py, efficient.py, sdpa_math.py):

    cudnn       q, k, v, result: 2 B (N + K) S H d; log-sum-exp 4 B N S; the additive mask
    flash       the same without a mask
    efficient   the same, the log-sum-exp padded to whole blocks of 32 queries
    eager       q, repeated k and v; softmax's fp32 result 4 B N S S, its cast to d (where d is not fp32), and with
                dropout a byte a probability and the dropped ones; scores are temporaries

Which kernel sdpa takes: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (torch 2.11).
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autocast import high, low
from memplan.ops.autograd import record, result_of, save_result
from memplan.ops.cudnn import cudnn_attention, takes_cudnn
from memplan.ops.efficient import efficient_attention
from memplan.ops.flash import flash_attention, takes_flash
from memplan.ops.linear import bmm
from memplan.ops.pointwise import (
    add,
    contiguous,
    copied_in_backward,
    dropout,
    expand_copy,
    expand_view,
    mul_number,
    saves_result,
    to,
)
from memplan.ops.sdpa_math import math_attention, softmax_backward
from memplan.ops.tensor import Shape, Tensor


def split_heads(x: Tensor, num_heads: int, head_dim: int, *, copies: bool = False) -> Tensor:
    """[B, S, N * H] -> view [B, N, S, H].

    `copies`: the gradient comes back laid out by heads (as rotary embedding and the eager products leave it), so
    that backward has to copy it into token order (ViewBackward0 -> reshape -> clone).
    """
    batch, tokens = x.shape[:2]
    shape = (batch, num_heads, tokens, head_dim)
    return copied_in_backward(x, shape) if copies else x.view(*shape)


def repeat_kv(x: Tensor, num_groups: int) -> Tensor:
    """[B, K, S, H] -> [B, K * groups, S, H], a copy unless there is one group, or one head to repeat: then a view."""
    if num_groups == 1:
        return x
    batch, heads, tokens, head_dim = x.shape
    return (expand_view if heads == 1 else expand_copy)(x, (batch, heads * num_groups, tokens, head_dim))


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    num_groups: int,
    p: float = 0.0,
    softmax_in_fp32: bool = True,
    casts_probabilities: bool = True,
    by_heads: bool = False,
    soft_caps: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """models/llama/modeling_llama.py `eager_attention_forward`: [B, S, N, H] and the probabilities, which
    the decoder layer holds until it returns.

    `by_heads`: q and k lie [B, N, S, H] in memory (a partial rotation concatenates them), not [B, S, N, H].
    `casts_probabilities`: where the softmax is not in fp32, its result is cast to the dtype of the values.
    `soft_caps`: the scores become tanh(scores / cap) * cap, as gemma2 has it.
    """
    key_states = repeat_kv(k, num_groups)
    value_states = repeat_kv(v, num_groups)
    scores_shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    copies = q.shape[0] > 1
    is_view = num_groups > 1 and k.shape[1] == 1
    copies_keys = copies and (is_view or (not by_heads and num_groups == 1))
    attn_weights = mul_number(matmul(q, key_states, scores_shape, copies=(copies and not by_heads, copies_keys)))
    if soft_caps:
        attn_weights = mul_number(attn_weights)
        attn_weights = saves_result(attn_weights)
        attn_weights = mul_number(attn_weights)
    if mask is not None:
        attn_weights = add(attn_weights, mask)
    if softmax_in_fp32:
        attn_weights = to(softmax_fp32(attn_weights), q.dtype)
    else:
        attn_weights = softmax(attn_weights)
        attn_weights = to(attn_weights, v.dtype) if casts_probabilities else attn_weights
    if p:
        attn_weights = dropout(attn_weights, p)
    output = weighted_values(attn_weights, value_states, by_tokens=num_groups == 1 or is_view)
    return contiguous(output), attn_weights


def weighted_values(attn_weights: Tensor, value_states: Tensor, *, by_tokens: bool) -> Tensor:
    """attn_weights @ value_states: [B, N, S, H]. With several sequences the values are copied if they lie by tokens,
    and so is the gradient in backward, which comes by tokens."""
    copies = value_states.shape[0] > 1
    shape = (*attn_weights.shape[:3], value_states.shape[3])
    output = matmul(attn_weights, value_states, shape, copies=(False, copies and by_tokens))
    return copied_in_backward(output, shape) if copies else output


def matmul(a: Tensor, b: Tensor, out_shape: Shape, *, copies: tuple[bool, bool]) -> Tensor:
    """torch.matmul of factors by batch and head: autocast casts them, and those that `copies` names are copied."""
    b, a = low(b), low(a)
    return bmm(operand(a, copies[0]), operand(b, copies[1]), out_shape)


def operand(x: Tensor, copies: bool) -> Tensor:
    """A [B, N, S, H] factor of torch.matmul, which copies what it cannot see as [B * N, S, H]: several sequences
    that lie by tokens."""
    return contiguous(x) if copies else x


def softmax_fp32(x: Tensor) -> Tensor:
    """softmax(x, dtype=float32): a bf16 input is cast first, which costs a temporary, an fp16 one is read by the kernel
    (ATen/native/SoftMax.cpp)."""
    if x.dtype is not DType.fp16:
        return softmax(to(x, DType.fp32))
    m = x.machine
    node = record(m, softmax_backward, (x,), meta=x.dtype)
    result = result_of(node, m, x.shape, DType.fp32)
    save_result(node, result)
    return result


def softmax(x: Tensor) -> Tensor:
    """Saves its result; see `softmax_backward` for what backward allocates."""
    m = x.machine
    x = high(x)
    node = record(m, softmax_backward, (x,))
    result = result_of(node, m, x.shape, x.dtype)
    save_result(node, result)
    return result


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    num_groups: int,
    p: float = 0.0,
    by_heads: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """integrations/sdpa_attention.py `sdpa_attention_forward` and the kernel it ends in: [B, S, N, H].

    `by_heads`: see `eager`. cuDNN's result lies as q does, so that `transpose(1, 2).contiguous()` copies it then.
    """
    if num_groups > 1 and (mask is not None or not k.shape[-1] == v.shape[-1] <= 256):
        k, v = repeat_kv(k, num_groups), repeat_kv(v, num_groups)
    mask = None if mask is None else low(mask)
    v, k, q = low(v), low(k), low(q)  # see `linear`
    if q.machine.device.prefers_cudnn_attention and takes_cudnn(q, v):
        output = cudnn_attention(q, k, v, mask)
        return contiguous(output) if by_heads else output, None
    if takes_flash(q, v, mask):
        return flash_attention(q, k, v), None
    if q.shape[1] != k.shape[1]:  # no fused kernel takes grouped heads in fp32
        return math_attention(q, k, v, mask, num_groups, p=p, by_heads=by_heads), None
    return efficient_attention(q, k, v, mask), None
