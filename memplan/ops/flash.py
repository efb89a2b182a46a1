"""scaled_dot_product_attention by the flash kernel: half precision without a mask, where cuDNN is not preferred or
the head's width is no multiple of 8.

Saves q, k, v, the result, one fp32 log-sum-exp per query and head, the random state. Widths that are no multiple of 8
are padded first (aten/src/ATen/native/transformers/attention.cpp `pad_last_dim`), backward works in fp32 sums and,
with grouped heads, on dk and dv of every query head (transformers/cuda/flash_attn/flash_api.cpp `mha_bwd`).
Sizes agree with allocation traces of an H200 (torch 2.11, head_dim 100).
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, attach, record, save_result
from memplan.ops.pointwise import GradList, slice_last
from memplan.ops.tensor import AttentionCall, Tensor

MAX_HEAD_DIM = 256
"""sdp_utils.cpp `check_head_dim_size_flash`."""


def takes_flash(q: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    return mask is None and q.dtype.is_half and q.shape[-1] == v.shape[-1] <= MAX_HEAD_DIM


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, N, S, H], k and v [B, K, S, H]: the result in token order, [B, S, N, H], so that `.contiguous()` of it
    is free."""
    width = q.shape[-1]
    q.machine.attention = AttentionCall("flash", q.dtype, masked=False)
    if width % 8:
        padded = -(-width // 8) * 8
        output = _attend(pad_last(q, padded), pad_last(k, padded), pad_last(v, padded))
        return slice_last(output, width)
    return _attend(q, k, v)


def pad_last(x: Tensor, width: int) -> Tensor:
    """F.pad of the last dimension: a copy; backward is a view of the gradient (constant_pad_nd -> slice)."""
    m = x.machine
    node = record(m, _narrow_backward, (x,), meta=x.shape)
    return attach(node, m.empty((*x.shape[:-1], width), x.dtype))


def _narrow_backward(node: Node, grads: GradList) -> Grads:
    # constant_pad_nd_backward: a copy of the inner part
    grad = grads[0]
    assert grad is not None
    return (node.machine.empty(node.meta, grad.dtype),)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
    batch, heads, tokens, width = q.shape
    rows = -(-tokens // 128) * 128
    softmax_d = m.empty((batch, heads, rows), DType.fp32)
    accumulated = m.empty((batch, rows, heads, round_head(width)), DType.fp32)
    expanded = (m.empty(q.shape, q.dtype), m.empty(q.shape, q.dtype)) if k.shape[1] != heads else ()
    del softmax_d, accumulated, expanded
    del saved, q, k, v
    return d_q, d_k, d_v


def round_head(width: int) -> int:
    """`head_size_rounded` of mha_bwd: multiples of 32 up to 128, of 64 above."""
    step = 32 if width <= 128 else 64
    return -(-width // step) * step
