"""What multi-head latent attention has of its own: rotation of pairs, and keys written into a new tensor in two parts.

Source: transformers 5.17 models/deepseek_v2/modeling_deepseek_v2.py, models/deepseek_v3/modeling_deepseek_v3.py.
B batch, N heads, S tokens, R width of the rotated part.

    rotate_complex (v2)      saves the frequencies, which layers share; fp32 copies of q and k are temporaries
    rotate_interleaved (v3)  saves the halves of cos and sin, views; four products and two sums a tensor are temporaries
    copy_into                saves nothing; backward copies the whole gradient, then the part of it
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, attach, record, result_of
from memplan.ops.pointwise import GradList, add, cat_last, incoming, mul, same_size_backward, slice_last, to
from memplan.ops.sink_attention import subtract
from memplan.ops.tensor import Tensor


def rotate_complex(q: Tensor, k: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """deepseek_v2 `apply_rotary_emb`: pairs of fp32 seen as complex numbers, times the frequencies [1, 1, S, R]."""
    q_pairs = to(q, DType.fp32)
    k_pairs = to(k, DType.fp32)
    q_out = to(_as_real(_multiply_complex(q_pairs, frequencies), copies=q.dtype is DType.fp32), q.dtype)
    k_out = to(_multiply_complex(k_pairs, frequencies), k.dtype)
    return q_out, k_out


def _multiply_complex(x: Tensor, frequencies: Tensor) -> Tensor:
    m = x.machine
    node = record(m, _multiply_complex_backward, (x,), (frequencies,))
    return result_of(node, m, x.shape, x.dtype)


def _multiply_complex_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    frequencies = node.unpack()
    conjugate = m.empty(frequencies.shape, frequencies.dtype)
    out = m.empty(grad.shape, grad.dtype)
    del conjugate, frequencies
    return (out,)


def _as_real(x: Tensor, *, copies: bool) -> Tensor:
    """torch.view_as_real: backward makes the gradient contiguous, which a cast after it would have done already."""
    if not copies:
        return x
    node = record(x.machine, same_size_backward, (x,))
    return attach(node, Tensor(x.storage, x.shape, x.dtype))


def rotate_interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """deepseek_v3 `apply_rotary_pos_emb_interleave`: even and odd elements, with the first half of each table."""
    half = q.shape[-1] // 2
    cos, sin = (Tensor(table.storage, (*table.shape[:-1], half), table.dtype) for table in (cos, sin))
    q1, q2 = slice_last(q, half), slice_last(q, half)
    k1, k2 = slice_last(k, half), slice_last(k, half)
    q_embed = cat_last([subtract(mul(q1, cos), mul(q2, sin)), add(mul(q2, cos), mul(q1, sin))])
    k_embed = cat_last([subtract(mul(k1, cos), mul(k2, sin)), add(mul(k2, cos), mul(k1, sin))])
    return q_embed, k_embed


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """x.expand(-1, num_heads, -1, -1) of [B, 1, S, R]: a view; backward sums over the heads."""
    node = record(x.machine, _sum_heads_backward, (x,), meta=x.shape)
    return attach(node, Tensor(x.storage, (x.shape[0], num_heads, *x.shape[2:]), x.dtype))


def _sum_heads_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def copy_into(base: Tensor, part: Tensor) -> Tensor:
    """base[..., a:b].copy_(part): the same storage; backward copies the whole gradient, then the part of it.

    Source: torch 2.11 torch/csrc/autograd/functions/tensor.cpp `CopySlices`, `CopyBackwards`.
    """
    node = record(base.machine, _copy_into_backward, (base, part), meta=part.shape)
    return attach(node, Tensor(base.storage, base.shape, base.dtype))


def _copy_into_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    whole = m.empty(grad.shape, grad.dtype)
    part = m.empty(node.meta, grad.dtype)
    if node.needs[0]:
        zeros = m.empty(node.meta, grad.dtype)
        del zeros
    return (whole if node.needs[0] else None), (part if node.needs[1] else None)
