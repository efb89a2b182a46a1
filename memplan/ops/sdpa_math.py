"""scaled_dot_product_attention op by op: what fp32 with grouped heads gets, since no fused kernel takes it.

k-bit preparation makes the residual stream fp32, so that QLoRA without autocast lands here on every model with grouped
keys: scores and probabilities [B, N, S, S] in fp32, each layer's probabilities saved.
Source: torch 2.11 aten/src/ATen/native/transformers/attention.cpp `_scaled_dot_product_attention_math`,
`_safe_softmax`; the order of allocations follows traces of an H200.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, record, result_of, save_result
from memplan.ops.efficient import additive_mask
from memplan.ops.linear import bmm
from memplan.ops.pointwise import (
    GradList,
    add_in_place,
    contiguous,
    expand_copy,
    mul_number,
    same_size_backward,
)
from memplan.ops.tensor import Tensor


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, num_groups: int) -> Tensor:
    """q [B, N, S, H], k and v [B, K, S, H]: [B, S, N, H] after the copy that puts tokens first.

    A batch of one needs no copies for its products: heads that lie by tokens are seen as [N, S, H].
    """
    m = q.machine
    batch, heads, tokens, _ = q.shape
    copies = batch > 1
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
    query = contiguous(q) if copies else q
    keys = contiguous(scaled_k) if copies and num_groups == 1 else scaled_k
    scores = bmm(query, keys, (batch, heads, tokens, tokens))
    del query, keys, scaled_k
    probabilities = safe_softmax(add_in_place(scores, mask))
    del scores
    values = contiguous(v) if copies and num_groups == 1 else v
    output = bmm(probabilities, values, (batch, heads, tokens, v.shape[-1]))
    del probabilities, values, k, q, mask  # the repeated keys live to the end
    return to_token_order(output, copies_back=copies)


def safe_softmax(x: Tensor) -> Tensor:
    """`_safe_softmax`: softmax, with rows that are masked whole set to zero. Saves its result."""
    m = x.machine
    node = record(m, softmax_backward, (x,))
    result = result_of(node, m, x.shape, x.dtype)
    masked = m.empty(x.shape, DType.bool8)
    rows = m.empty((*x.shape[:-1], 1), DType.bool8)
    zero = m.empty((), x.dtype)
    del zero, rows, masked
    save_result(node, result)
    return result


def softmax_backward(node: Node, grads: GradList) -> Grads:
    """One tensor, and the product of gradient and result beside it (cuda/SoftMax.cu
    `softmax_backward_cuda_out`)."""
    result, m = node.unpack(), node.machine
    out = m.empty(result.shape, result.dtype)
    product = m.empty(result.shape, result.dtype)
    del product, result
    return (out,)


def to_token_order(x: Tensor, *, copies_back: bool) -> Tensor:
    """[B, N, S, H].transpose(1, 2).contiguous(); backward copies the gradient back where the product needs it."""
    if not copies_back:
        return contiguous(x)
    m = x.machine
    return result_of(record(m, same_size_backward, (x,)), m, x.shape, x.dtype)
