"""Rotary position embedding as transformers applies it (models/llama/modeling_llama.py `apply_rotary_pos_emb`).

q * cos + rotate_half(q) * sin: the products save cos and sin, which all layers share; backward of the two slices
of rotate_half writes into zeros of the whole.
"""

from __future__ import annotations

from memplan.ops.pointwise import add, cat_last, mul, neg, repeat_interleave_last, slice_last, stack_last
from memplan.ops.tensor import Tensor


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first = slice_last(x, half)
    second = slice_last(x, x.shape[-1] - half)
    return cat_last([neg(second), first])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, S, head_dim] with cos, sin [1, 1, S, head_dim]."""
    return add(mul(x, cos), mul(rotate_half(x), sin))


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q_embed = rotate(q, cos, sin)
    k_embed = rotate(k, cos, sin)
    return q_embed, k_embed


def rotate_half_pairs(x: Tensor) -> Tensor:
    """rotate_half of models/cohere and models/glm: (-x[1], x[0], -x[3], x[2], ...)."""
    half = x.shape[-1] // 2
    first, second = slice_last(x, half), slice_last(x, half)
    return stack_last([neg(second), first])


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, heads, S, H] with cos, sin [1, 1, S, H], neighbours rotating as a pair."""
    return add(mul(x, cos), mul(rotate_half_pairs(x), sin))


def apply_partial_rotary_pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """models/glm/modeling_glm.py: tables of its own, the first half of the shared ones with each value twice."""
    width, head_dim = cos.shape[-1], q.shape[-1]
    cos = repeat_interleave_last(cos, width)
    sin = repeat_interleave_last(sin, width)
    q_rot, q_pass = slice_last(q, width), slice_last(q, head_dim - width)
    k_rot, k_pass = slice_last(k, width), slice_last(k, head_dim - width)
    q_embed = rotate_pairs(q_rot, cos, sin)
    k_embed = rotate_pairs(k_rot, cos, sin)
    q_embed = cat_last([q_embed, q_pass])
    return q_embed, cat_last([k_embed, k_pass])


def apply_partial_rotary(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> Tensor:
    """Only the first `rotary_dim` of the head rotate; the rest is passed on and concatenated."""
    rotated, passed = slice_last(x, rotary_dim), slice_last(x, x.shape[-1] - rotary_dim)
    return cat_last([rotate(rotated, cos, sin), passed])


def apply_partial_rotary_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k are both rotated before either is put together again (models/gpt_neox `apply_rotary_pos_emb`)."""
    width = cos.shape[-1]
    q_rot, q_pass = slice_last(q, width), slice_last(q, q.shape[-1] - width)
    k_rot, k_pass = slice_last(k, width), slice_last(k, k.shape[-1] - width)
    q_embed = rotate(q_rot, cos, sin)
    k_embed = rotate(k_rot, cos, sin)
    q_embed = cat_last([q_embed, q_pass])
    k_embed = cat_last([k_embed, k_pass])
    return q_embed, k_embed
