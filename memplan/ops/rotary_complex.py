"""Rotary position embedding by complex numbers (models/llama4/modeling_llama4.py `apply_rotary_emb`).

Neighbours in a head are one complex64 number of 8 bytes, which takes what its two fp32 parts take: tensors here have
the shape of the parts. x [B, N, S, H] in dtype d, the table [1, 1, S, H] of all layers:

    x.float()               a copy unless d is fp32; let go of when queries and keys are rotated
    product with the table  saves the table alone; backward multiplies by its conjugate, a copy of the table
    back to d               a copy unless d is fp32
    view_as_real            backward wants the gradient token by token: where it lies by heads, a copy in fp32
                            (tools/autograd/derivatives.yaml, torch 2.11)
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, record, result_of
from memplan.ops.pointwise import GradList, copied_in_backward, incoming, to
from memplan.ops.tensor import Machine, Tensor


def complex_table(m: Machine, tokens: int, width: int) -> Tensor:
    """cos + i sin of every position and pair (`Llama4TextRotaryEmbedding`)."""
    shape = (1, 1, tokens, width)
    positions = m.empty((1, 1, tokens), DType.fp32)
    frequencies = m.empty((1, width // 2, tokens), DType.fp32)
    m.calls("cublas")
    ones = m.empty((1, tokens, width // 2), DType.fp32)
    polar = m.empty(shape, DType.fp32)
    del ones
    scaled = m.empty(shape, DType.fp32)
    del polar, positions, frequencies
    return scaled


def apply_rotary_complex(q: Tensor, k: Tensor, table: Tensor, *, copies: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated. `copies`: of each, whether its gradient comes back laid out by heads."""
    q_ = to(q, DType.fp32)
    k_ = to(k, DType.fp32)
    q_out = as_real(multiply(q_, table), copies=copies[0])
    k_out = as_real(multiply(k_, table), copies=copies[1])
    q_rotated = to(q_out, q.dtype)
    return q_rotated, to(k_out, k.dtype)


def as_real(x: Tensor, *, copies: bool) -> Tensor:
    """torch.view_as_real"""
    return copied_in_backward(x, x.shape) if copies else x


def multiply(x: Tensor, table: Tensor) -> Tensor:
    """x * table of complex numbers, where the table needs no gradient."""
    m = x.machine
    return result_of(record(m, _multiply_backward, (x,), (table,)), m, x.shape, x.dtype)


def _multiply_backward(node: Node, grads: GradList) -> Grads:
    grad, m, table = incoming(grads), node.machine, node.unpack()
    conjugate = m.empty(table.shape, table.dtype)
    out = m.empty(grad.shape, grad.dtype)
    del conjugate, table
    return (out,)
