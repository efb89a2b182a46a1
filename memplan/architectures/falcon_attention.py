"""falcon's attention apart from sdpa's kernels: how one projection becomes heads, and the two attentions in eager ops.

Source: transformers 5.17 models/falcon/modeling_falcon.py `FalconAttention`. B batch, N query heads, K key-value heads,
G = N / K, S tokens, D width of a head.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.model_spec import ModelSpec
from memplan.ops.attention import operand, softmax
from memplan.ops.autocast import low
from memplan.ops.linear import bmm
from memplan.ops.pointwise import (
    add,
    contiguous,
    copied_in_backward,
    dropout,
    expand_copy,
    expand_view,
    mul_number_in_place,
    slice_last,
    to,
)
from memplan.ops.rows import index_last_heads
from memplan.ops.tensor import Machine, Tensor


def key_value_heads(spec: ModelSpec) -> int:
    """Key and value heads in the projection."""
    if spec.new_decoder_architecture:
        return spec.num_key_value_heads
    return 1 if spec.multi_query else spec.num_attention_heads


def split_heads(spec: ModelSpec, fused_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_split_heads`: q [B, N, S, D], k and v of as many heads where they are grouped, else of their own."""
    batch, tokens = fused_qkv.shape[:2]
    heads, width = spec.num_attention_heads, spec.head_dim
    kv_heads = key_value_heads(spec)
    by_head = (batch, heads, tokens, width)
    if not spec.new_decoder_architecture and not spec.multi_query:
        parts = [slice_last(fused_qkv.view(batch, tokens, heads, 3 * width), width) for _ in range(3)]
        return parts[0].view(*by_head), parts[1].view(*by_head), parts[2].view(*by_head)
    groups = heads // kv_heads
    grouped = fused_qkv.view(batch, tokens, kv_heads, (groups + 2) * width)
    query = slice_last(grouped, groups * width)
    key = index_last_heads(grouped, (batch, tokens, kv_heads, width))
    value = index_last_heads(grouped, (batch, tokens, kv_heads, width))
    if not spec.new_decoder_architecture:
        return query.view(*by_head), key.view(batch, 1, tokens, width), value.view(batch, 1, tokens, width)
    flat = (batch, tokens, heads, width)
    query, key, value = (
        contiguous(query) if kv_heads > 1 else query,
        expand_copy(key, flat) if groups > 1 else key,
        expand_copy(value, flat) if groups > 1 else value,
    )
    return query.view(*by_head), key.view(*by_head), value.view(*by_head)


def attend_by_ops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dtype: DType) -> tuple[Tensor, Tensor]:
    """Eager attention behind a rotation: the result [B, N, S, D] and the probabilities."""
    attention_scores = mul_number_in_place(_scores(q, k))
    attention_scores = _softmax_in(add(attention_scores, mask), dtype)
    return _weighted(attention_scores, v), attention_scores


def attend_by_alibi(
    q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, mask: Tensor, dtype: DType, p: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Eager attention with biases: the result [B, N, S, D], the probabilities, and what else lives until attention
    returns: scores in two dtypes and biased scores [B, N, S, S]."""
    matmul_result = _scores(q, k)
    attention_scores = to(matmul_result, DType.fp32)
    batch, heads, _, tokens = matmul_result.shape
    attention_logits = add(attention_scores, alibi.view(batch, heads, 1, tokens))
    attention_logits = mul_number_in_place(attention_logits)
    attention_probs = _softmax_in(add(attention_logits, mask), dtype)
    attention_probs = dropout(attention_probs, p)
    return _weighted(attention_probs, v), attention_probs, [matmul_result, attention_scores, attention_logits]


def _softmax_in(x: Tensor, dtype: DType) -> Tensor:
    """F.softmax(x, dtype=dtype), which holds `x` beside its cast."""
    return softmax(to(x, dtype))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    copies = q.shape[0] > 1
    k, q = low(k), low(q)  # autocast casts before torch.matmul copies
    return bmm(operand(q, copies), _for_all_heads(k, q.shape[1], copies), (*q.shape[:3], k.shape[2]))


def _weighted(attention_probs: Tensor, v: Tensor) -> Tensor:
    copies = v.shape[0] > 1
    v, attention_probs = low(v), low(attention_probs)
    shape = (*attention_probs.shape[:3], v.shape[3])
    output = bmm(attention_probs, _for_all_heads(v, shape[1], copies), shape)
    return copied_in_backward(output, shape) if copies else output


def _for_all_heads(x: Tensor, heads: int, copies: bool) -> Tensor:
    """torch.matmul broadcasts one key head over all query heads, by a copy if there are several sequences."""
    if x.shape[1] == heads:
        return operand(x, copies)
    shape = (x.shape[0], heads, *x.shape[2:])
    return expand_copy(x, shape) if copies else expand_view(x, shape)


def merge_alibi(m: Machine, alibi: Tensor, mask: Tensor, dtype: DType) -> Tensor:
    """The mask with the biases in it, [B, N, S, S] in `dtype` (`FalconModel.forward`)."""
    heads = alibi.shape[0] // mask.shape[0]
    if not mask.dtype.is_floating:
        zero = m.empty((), dtype)
        mask = m.empty(mask.shape, dtype)
        del zero
    scaled = m.empty(alibi.shape, dtype)
    below = m.empty(mask.shape, DType.bool8)
    merged = m.empty((mask.shape[0], heads, *mask.shape[2:]), dtype)
    del scaled, below
    return merged
