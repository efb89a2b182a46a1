"""Attention: the eager matrix products, and the fused kernels behind scaled_dot_product_attention.

Shapes: B batch, N query heads, K key-value heads, S tokens, H head_dim; q [B, N, S, H], k and v [B, K, S, H].

    flash       saves q, k, v, the result and one fp32 log-sum-exp per query and head
    efficient   the same, the log-sum-exp padded to whole blocks of 32 queries; takes a mask
    eager       scores and probabilities [B, N, S, S], some of them twice

Which kernel sdpa takes: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (torch 2.11).
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autocast import high, low
from memplan.ops.autograd import Grads, Node, attach, record, result_of, save_result
from memplan.ops.cudnn import cudnn_attention, takes_cudnn
from memplan.ops.linear import bmm
from memplan.ops.pointwise import (
    GradList,
    add,
    contiguous,
    dropout,
    expand_copy,
    incoming,
    mul_number,
    same_size_backward,
    to,
)
from memplan.ops.tensor import Tensor

FLASH_MAX_HEAD_DIM = 256
"""Largest head that the flash kernel takes: sdp_utils.cpp `check_head_dim_size_flash`."""


def split_heads(x: Tensor, num_heads: int, head_dim: int, *, copies: bool = False) -> Tensor:
    """[B, S, N * H] -> view [B, N, S, H].

    `copies`: the gradient comes back laid out by heads (as rotary embedding and the eager products leave it), so
    that backward has to copy it into token order (ViewBackward0 -> reshape -> clone).
    """
    batch, tokens = x.shape[:2]
    shape = (batch, num_heads, tokens, head_dim)
    if not copies or not x.requires_grad or not x.machine.grad_enabled:
        return x.view(*shape)
    node = record(x.machine, same_size_backward, (x,))
    return attach(node, Tensor(x.storage, shape, x.dtype))


def repeat_kv(x: Tensor, num_groups: int) -> Tensor:
    """[B, K, S, H] -> [B, K * groups, S, H], a copy unless there is one group."""
    if num_groups == 1:
        return x
    batch, heads, tokens, head_dim = x.shape
    return expand_copy(x, (batch, heads * num_groups, tokens, head_dim))


def eager(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, num_groups: int, p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """models/llama/modeling_llama.py `eager_attention_forward`: [B, S, N, H] and the probabilities, which
    the decoder layer holds until it returns."""
    key_states = repeat_kv(k, num_groups)
    value_states = repeat_kv(v, num_groups)
    scores_shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    attn_weights = mul_number(bmm(q, key_states, scores_shape))
    if mask is not None:
        attn_weights = add(attn_weights, mask)
    attn_weights = to(softmax_fp32(attn_weights), q.dtype)
    if p:
        attn_weights = dropout(attn_weights, p)
    output = bmm(attn_weights, value_states, (*q.shape[:3], v.shape[3]))
    return contiguous(output), attn_weights


def softmax_fp32(x: Tensor) -> Tensor:
    """softmax(x, dtype=float32): a bf16 input is cast first, which costs a temporary (ATen/native/SoftMax.cpp)."""
    return softmax(to(x, DType.fp32))


def softmax(x: Tensor) -> Tensor:
    """Saves its result; backward allocates one tensor."""
    m = x.machine
    x = high(x)
    node = record(m, same_size_backward, (x,))
    result = result_of(node, m, x.shape, x.dtype)
    save_result(node, result)
    return result


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, num_groups: int, p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """integrations/sdpa_attention.py `sdpa_attention_forward` and the kernel it ends in: [B, S, N, H]."""
    if num_groups > 1 and (mask is not None or not k.shape[-1] == v.shape[-1] <= 256):
        k, v = repeat_kv(k, num_groups), repeat_kv(v, num_groups)
    q, k, v = low(q), low(k), low(v)
    if q.machine.device.prefers_cudnn_attention and takes_cudnn(q, v):
        return cudnn_attention(q, k, v, mask), None
    flash = mask is None and q.dtype.is_half and q.shape[-1] == v.shape[-1] <= FLASH_MAX_HEAD_DIM
    return flash_attention(q, k, v) if flash else efficient_attention(q, k, v, mask), None


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """_scaled_dot_product_flash_attention; result in token order, so that `.contiguous()` after it is free."""
    m = q.machine
    node = record(m, _flash_backward, (q, k, v), (q, k, v))
    batch, heads, tokens, _ = q.shape
    result = m.empty((batch, tokens, heads, v.shape[-1]), q.dtype)
    log_sum_exp = m.empty((batch, heads, tokens), DType.fp32)
    random_state = m.empty((2,), DType.int64), m.empty((), DType.int64)
    attach(node, result)
    save_result(node, result, log_sum_exp, *random_state)
    return result


def _flash_backward(node: Node, grads: GradList) -> Grads:
    saved = [node.unpack(i) for i in range(len(node.saved))]
    q, k, v = saved[:3]
    m = node.machine
    d_q, d_k, d_v = m.empty(q.shape, q.dtype), m.empty(k.shape, k.dtype), m.empty(v.shape, v.dtype)
    del saved, q, k, v
    return d_q, d_k, d_v


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """_scaled_dot_product_efficient_attention; a boolean mask becomes an additive one of q's dtype first."""
    m = q.machine
    if mask is not None and not mask.dtype.is_floating:
        mask = m.empty(mask.shape, q.dtype)
    saved = (q, k, v) if mask is None else (q, k, v, mask)
    node = record(m, _efficient_backward, (q, k, v), saved)
    batch, heads, tokens, _ = q.shape
    result = m.empty((batch, tokens, heads, v.shape[-1]), q.dtype)
    log_sum_exp = m.empty((batch, heads, -(-tokens // 32) * 32), DType.fp32)
    random_state = m.empty((), DType.int64), m.empty((), DType.int64)
    attach(node, result)
    save_result(node, result, log_sum_exp, *random_state)
    return result


def _efficient_backward(node: Node, grads: GradList) -> Grads:
    saved = [node.unpack(i) for i in range(len(node.saved))]
    q, k, v = saved[:3]
    m = node.machine
    d_q, d_k, d_v = m.empty(q.shape, q.dtype), m.empty(k.shape, k.dtype), m.empty(v.shape, v.dtype)
    del saved, q, k, v
    incoming(grads)
    return d_q, d_k, d_v
