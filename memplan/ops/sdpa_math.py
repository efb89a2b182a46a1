"""scaled_dot_product_attention op by op: what fp32 with grouped heads gets, since no fused kernel takes it.

k-bit preparation makes the residual stream fp32, so that QLoRA without autocast lands here on every model with grouped
keys: scores and probabilities [B, N, S, S] in fp32, each layer's probabilities saved.
Source: torch 2.11 aten/src/ATen/native/transformers/attention.cpp `_scaled_dot_product_attention_math`,
`_safe_softmax`; the order of allocations follows traces of an H200.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autocast import low
from memplan.ops.autograd import Grads, Node, record, result_of, save_result
from memplan.ops.efficient import additive_mask
from memplan.ops.linear import bmm
from memplan.ops.pointwise import (
    GradList,
    add_in_place,
    contiguous,
    copied_in_backward,
    dropout,
    expand_copy,
    expand_view,
    mul_number,
    same_size_backward,
    to,
)
from memplan.ops.tensor import AttentionCall, Tensor


def math_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_groups: int, *, p: float = 0.0, by_heads: bool = False
) -> Tensor:
    """q [B, N, S, H], k and v [B, K, S, H]: [B, S, N, H] after the copy that puts tokens first.

    A batch of one needs no copies for its products: heads that lie by tokens are seen as [N, S, H]; nor do q and k that
    lie by heads.
    """
    m = q.machine
    batch, heads, tokens, _ = q.shape
    copies = batch > 1
    m.attention = AttentionCall("products", q.dtype, masked=True)
    q = mul_number(q)
    if mask is None:
        ones = m.empty((tokens, tokens), DType.bool8)
        causal = m.empty((tokens, tokens), DType.bool8)
        del ones
        mask = additive_mask(causal, q.dtype)
        del causal
    else:
        mask = additive_mask(mask, q.dtype)
    if num_groups > 1:
        shape = (batch, heads, tokens, k.shape[-1])
        k, v = expand_copy(k, shape), expand_copy(v, (*shape[:3], v.shape[-1]))
    scaled_k = mul_number(k)
    query = contiguous(q) if copies and not by_heads else q
    keys = contiguous(scaled_k) if copies and num_groups == 1 and not by_heads else scaled_k
    scores = bmm(query, keys, (batch, heads, tokens, tokens))
    del query, keys, scaled_k
    probabilities = safe_softmax(add_in_place(scores, mask))
    del scores
    probabilities = dropout(probabilities, p)
    values = contiguous(v) if copies and num_groups == 1 else v
    output = bmm(probabilities, values, (batch, heads, tokens, v.shape[-1]))
    del probabilities, values, k, q, mask  # the repeated keys live to the end
    return to_token_order(output, copies_back=copies)


def math_attention_over_one_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, N, S, H] over k and v [B, 1, S, H], which the products broadcast: [B, N, S, H].

    Multi-query attention without `enable_gqa` (falcon) has no fused kernel in any dtype; half precision is cast to
    fp32, and the probabilities back to it, though nobody asks for them. Autocast casts what goes in and is off inside.
    """
    m = q.machine
    mask, v, k, q = low(mask), low(v), low(k), low(q)
    autocast, m.autocast = m.autocast, False
    try:
        return _over_one_key(q, k, v, mask)
    finally:
        m.autocast = autocast


def _over_one_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    dtype = q.dtype
    batch, heads, tokens, width = q.shape
    mask = additive_mask(mask, dtype)
    # `.expand().reshape()` copies what it cannot see as [B * N, S, H], as bmm would have it
    repeat = expand_copy if batch > 1 else expand_view
    q, k, v = to(q, DType.fp32), to(k, DType.fp32), to(v, DType.fp32)
    q.machine.attention = AttentionCall("products", DType.fp32, masked=True)
    scaled_q = mul_number(q)
    scaled_k = mul_number(k)
    query = contiguous(scaled_q) if batch > 1 else scaled_q
    keys = repeat(scaled_k, (batch, heads, tokens, width))
    scores = bmm(query, keys, (batch, heads, tokens, tokens))
    del query, keys, scaled_k
    scores = safe_softmax(add_in_place(scores, mask))
    beside = to(scores, dtype)
    values = repeat(v, (batch, heads, tokens, width))
    output = bmm(scores, values, (batch, heads, tokens, width))
    del values
    if batch > 1:
        output = copied_in_backward(output, output.shape)
    output = to(output, dtype)
    del scaled_q, beside
    return output


def safe_softmax(x: Tensor) -> Tensor:
    """`_safe_softmax`: softmax, with rows that are masked whole set to zero. Saves its result."""
    m = x.machine
    node = record(m, softmax_backward, (x,))
    result = result_of(node, m, x.shape, x.dtype)
    if m.device.is_cuda:
        masked = m.empty(x.shape, DType.bool8)
        rows = m.empty((*x.shape[:-1], 1), DType.bool8)
        zero = m.empty((), x.dtype)
        del zero, rows, masked
    save_result(node, result)
    return result


def softmax_backward(node: Node, grads: GradList) -> Grads:
    """One tensor, of the dtype in `meta` where the input had another, and the product of gradient and result beside it
    (cuda/SoftMax.cu `softmax_backward_cuda_out`)."""
    result, m = node.unpack(), node.machine
    out = m.empty(result.shape, node.meta or result.dtype)
    product = m.empty(result.shape, result.dtype)
    del product, result
    return (out,)


def to_token_order(x: Tensor, *, copies_back: bool) -> Tensor:
    """[B, N, S, H].transpose(1, 2).contiguous(); backward copies the gradient back where the product needs it."""
    if not copies_back:
        return contiguous(x)
    m = x.machine
    return result_of(record(m, same_size_backward, (x,)), m, x.shape, x.dtype)
