"""scaled_dot_product_attention by the memory-efficient kernel: fp32, or half precision with a mask off Hopper.

Saves q, k, v, the result, one fp32 log-sum-exp per query and head (padded to 32 queries) and the additive mask.
Source: torch 2.11 aten/src/ATen/native/transformers/cuda/attention.cu, attention_backward.cu,
mem_eff_attention/kernel_backward.h; sizes agree with allocation traces of an H200 for fp32.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, attach, record, save_result
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.tensor import AttentionCall, Tensor

MASK_ALIGNMENT = 8
BLOCK_QUERIES = 64


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q, k, v [B, N, S, H]: the result in token order, [B, S, N, H]."""
    m = q.machine
    m.attention = AttentionCall("efficient", q.dtype, mask is not None)
    if mask is not None:
        mask = additive_mask(mask, q.dtype)
        if mask.shape[-1] % MASK_ALIGNMENT:  # `pad_bias`
            mask = m.empty((*mask.shape[:-1], -(-mask.shape[-1] // MASK_ALIGNMENT) * MASK_ALIGNMENT), q.dtype)
    saved = (q, k, v) if mask is None else (q, k, v, mask)
    node = record(m, _efficient_backward, (q, k, v), saved)
    del saved
    batch, heads, tokens, _ = q.shape
    result = m.empty((batch, tokens, heads, v.shape[-1]), q.dtype)
    log_sum_exp = m.empty((batch, heads, -(-tokens // 32) * 32), DType.fp32)
    attach(node, result)
    save_result(node, result, log_sum_exp)
    del mask, log_sum_exp
    return result


def additive_mask(mask: Tensor, dtype: DType) -> Tensor:
    """attention.cpp `convert_boolean_attn_mask`: zeros and minus infinity by torch.where, with two scalars."""
    if mask.dtype.is_floating:
        return mask
    m = mask.machine
    scalars = m.empty((), dtype), m.empty((), dtype)
    made = m.empty(mask.shape, dtype)
    del scalars
    return made


def _efficient_backward(node: Node, grads: GradList) -> Grads:
    saved = [node.unpack(i) for i in range(len(node.saved))]
    q, k, v = saved[:3]
    m = node.machine
    d_q, d_k, d_v = m.empty(q.shape, q.dtype), m.empty(k.shape, k.dtype), m.empty(v.shape, v.dtype)
    grad = incoming(grads)
    shape = grad.shape
    halves = (m.empty(shape, DType.fp32), m.empty(shape, DType.fp32)) if q.dtype.is_half else ()
    product = m.empty(shape, DType.fp32)
    row_sums = m.empty(q.shape[:3], DType.fp32)
    delta = m.empty(q.shape[:3], DType.fp32)
    del row_sums, product, halves, grad
    workspace = m.workspace(backward_workspace_bytes(q))
    del delta, workspace
    del saved, q, k, v
    return d_q, d_k, d_v


def backward_workspace_bytes(q: Tensor) -> int:
    """kernel_backward.h `workspace_size`: per block of 64 queries, partial dq in fp32 with a lock and a counter."""
    batch, heads, tokens, width = q.shape
    columns = 64 if width <= 64 else 128
    blocks = -(-tokens // BLOCK_QUERIES) * -(-width // columns)
    return batch * heads * blocks * (BLOCK_QUERIES * columns * 4 + 16)
