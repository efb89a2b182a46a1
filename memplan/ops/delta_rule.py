"""The gated delta rule by chunks of 64 tokens, as transformers writes it out in PyTorch.

transformers 5.17 models/qwen3_next/modeling_qwen3_next.py `torch_chunk_gated_delta_rule`, which runs where the package
flash-linear-attention is not installed. B batch, H value heads, T tokens padded to N chunks of C = 64, K and V widths
of a key and of a value head. All fp32, but the products under autocast, which are bf16 (and their operands cast to it).

What a layer keeps for backward, in elements, in the order of the code:

    query, key          2 B H S K           cast, by heads; factors of the norm
    inverse norms       2 B H S
    normed and scaled   2 B H T K           padded: key, and query, factors of the products
    value, beta         B H T V + B H T     padded: factors of beta * value
    k_beta, v_beta      B H T K             (v_beta is a local: only until the function returns)
    pairwise decay      B H T C             exp's result, and a factor of the two products below
    k_beta key', and    4 B H T C           two products and each times the decay (the system to solve, the
    query key'                              attention within a chunk)
    exp of decays       3 B H T             for keys, queries, and what a chunk leaves
    new values, keys    B H T (V + K)       solutions of the triangular system (column by column in memory)
    query, key          2 B H T K           decayed
    a chunk's           N B H (C V + K V)   corrected values, and the state [K, V] that the next chunk reads

Then, and until the function returns, the result and its copy by chunks, 2 B H T V (it lies column by column as the
solutions do, and the chunks are not neighbours).

Backward goes through the chunks one by one. What `[:, :, i]` read gets its gradient in zeros of the whole: one such
tensor stays, a second is there while it is added. What `core_attn_out[:, :, i] =` wrote makes a copy of the whole
gradient and of the chunk's (CopySlices, torch/csrc/autograd/functions/tensor.cpp). A triangular solve makes the right
side's gradient and three tensors [B, H, N, C, C], of which one stays (FunctionsManual.cpp
`linalg_solve_triangular_backward`).

The code that solves by a loop over the 64 rows in place runs only when a model is exported, and is not here.
"""

from __future__ import annotations

from math import prod

from memplan.dtypes import DType
from memplan.ops.attention import operand
from memplan.ops.autocast import high, low
from memplan.ops.autograd import Grads, Node, attach, record, result_of, save_result
from memplan.ops.linear import bmm
from memplan.ops.pointwise import (
    GradList,
    add,
    add_number,
    clone,
    incoming,
    mul,
    mul_number,
    rsqrt,
    saves_result,
    slice_last,
    sub,
    to,
)
from memplan.ops.rows import masked_fill, sum_last, view_as
from memplan.ops.tensor import Machine, Shape, Tensor

CHUNK_SIZE = 64


def chunk_gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """query, key [B, H, S, K], value [B, H, S, V], decay and beta [B, H, S], views by heads: [B, H, S, V]."""
    m, initial_dtype = query.machine, query.dtype
    batch, heads, tokens, _ = query.shape
    pad_size = -tokens % CHUNK_SIZE
    num_chunks = (tokens + pad_size) // CHUNK_SIZE
    # Casts and padding leave rows by heads; without either they lie by tokens still.
    by_tokens = query.dtype is DType.fp32 and not pad_size and heads > 1
    copies = by_tokens and (batch > 1 or num_chunks > 1)
    copies_chunk = by_tokens and batch > 1
    query, key, value, beta, decay = [to(x, DType.fp32) for x in (query, key, value, beta, decay)]
    query = _l2norm(query)
    key = _l2norm(key)
    query = mul_number(query)
    query, key, value = [_pad(x, (batch, heads, tokens + pad_size, x.shape[-1])) for x in (query, key, value)]
    beta, decay = [_pad(x, (batch, heads, tokens + pad_size)) for x in (beta, decay)]

    v_beta = mul(value, beta.view(*beta.shape, 1))
    k_beta = mul(key, beta.view(*beta.shape, 1))
    query, key, k_beta, v_beta = [
        view_as(x, (batch, heads, num_chunks, CHUNK_SIZE, x.shape[-1]), copies_gradient=solved and num_chunks > 1)
        for x, solved in ((query, False), (key, False), (k_beta, True), (v_beta, True))
    ]
    rows = (batch, heads, num_chunks, CHUNK_SIZE)
    decay = decay.view(*rows)
    strictly_upper_mask = _triangle(m)
    cum_decay = _cumsum(decay)

    pairwise_decay = sub(cum_decay.view(*rows, 1), cum_decay.view(*rows[:3], 1, CHUNK_SIZE))
    pairwise_decay = masked_fill(pairwise_decay, strictly_upper_mask)
    pairwise_decay = _exp(pairwise_decay)
    square = (*rows, CHUNK_SIZE)
    ut_system = mul(_matmul(k_beta, key, square, copies=(copies, copies)), pairwise_decay)
    intra_chunk_attn = mul(_matmul(query, key, square, copies=(copies, copies)), pairwise_decay)
    decayed_k_beta = mul(k_beta, _exp(cum_decay).view(*rows, 1))
    new_values = _solve_triangular(ut_system, v_beta)
    k_cumdecay = _solve_triangular(ut_system, decayed_k_beta)

    width, v_width = query.shape[-1], v_beta.shape[-1]
    state, chunk = (batch, heads, width, v_width), (batch, heads, CHUNK_SIZE, v_width)
    last_recurrent_state = m.empty(state, DType.fp32)
    core_attn_out = m.empty(new_values.shape, DType.fp32)
    query = mul(query, _exp(cum_decay).view(*rows, 1))
    key = mul(key, _exp(sub(slice_last(cum_decay, 1), cum_decay)).view(*rows, 1))
    chunk_decay = _exp(slice_last(cum_decay, 1).view(*rows[:3])).view(*rows[:3], 1, 1)
    of_chunk, neither = (copies_chunk, False), (False, False)
    for _ in range(num_chunks):
        v_new = sub(_select(new_values), _matmul(_select(k_cumdecay), last_recurrent_state, chunk, copies=neither))
        inter_chunk_attn = _matmul(_select(query), last_recurrent_state, chunk, copies=of_chunk)
        core_attn_out = _copy_into(
            core_attn_out, add(inter_chunk_attn, _matmul(_select(intra_chunk_attn), v_new, chunk, copies=neither))
        )
        last_recurrent_state = add(
            mul(last_recurrent_state, _select(chunk_decay)), _matmul(_select(key), v_new, state, copies=of_chunk)
        )
    del last_recurrent_state
    padded = (batch, heads, tokens + pad_size, v_width)
    core_attn_out = clone(core_attn_out).view(*padded) if num_chunks > 1 else core_attn_out.view(*padded)
    if pad_size:
        core_attn_out = _slice_tokens(core_attn_out, tokens)
    if (
        num_chunks == 1 and initial_dtype is DType.fp32
    ):  # it lies as channels-last tensors do, which `to` makes contiguous
        core_attn_out = clone(core_attn_out)
    core_attn_out = to(core_attn_out, initial_dtype)
    return core_attn_out  # noqa: RET504  the old one dies before the other locals


def _l2norm(x: Tensor) -> Tensor:
    inv_norm = rsqrt(add_number(sum_last(mul(x, x))))
    return mul(x, inv_norm)


def _pad(x: Tensor, shape: Shape) -> Tensor:
    """F.pad: a copy even where it adds nothing; backward takes the padding off into a copy."""
    m = x.machine
    return result_of(record(m, _to_shape_of_input, (x,), meta=x.shape), m, shape, x.dtype)


def _slice_tokens(x: Tensor, tokens: int) -> Tensor:
    """x[:, :, :tokens], a view; backward writes it into zeros of the whole."""
    batch, heads, _, width = x.shape
    return attach(
        record(x.machine, _to_shape_of_input, (x,), meta=x.shape),
        Tensor(x.storage, (batch, heads, tokens, width), x.dtype),
    )


def _select(x: Tensor) -> Tensor:
    """x[:, :, i], a view; backward writes it into zeros of the whole."""
    node = record(x.machine, _to_shape_of_input, (x,), meta=x.shape)
    return attach(node, Tensor(x.storage, (*x.shape[:2], *x.shape[3:]), x.dtype))


def _to_shape_of_input(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def _triangle(m: Machine) -> Tensor:
    """torch.ones(C, C, dtype=torch.bool).triu(1)"""
    ones = m.empty((CHUNK_SIZE, CHUNK_SIZE), DType.bool8)
    mask = m.empty((CHUNK_SIZE, CHUNK_SIZE), DType.bool8)
    del ones
    return mask


def _exp(x: Tensor) -> Tensor:
    return saves_result(high(x))


def _cumsum(x: Tensor) -> Tensor:
    """x.cumsum(-1)"""
    m = x.machine
    return result_of(record(m, _cumsum_backward, (x,)), m, x.shape, x.dtype)


def _cumsum_backward(node: Node, grads: GradList) -> Grads:
    # FunctionsManual.cpp cumsum_backward: grad.flip(dim).cumsum(dim).flip(dim)
    grad, m = incoming(grads), node.machine
    flipped = m.empty(grad.shape, grad.dtype)
    summed = m.empty(grad.shape, grad.dtype)
    out = m.empty(grad.shape, grad.dtype)
    del summed, flipped
    return (out,)


def _matmul(a: Tensor, b: Tensor, out_shape: Shape, *, copies: tuple[bool, bool]) -> Tensor:
    """a @ b of any number of leading dimensions; those that `copies` names cannot be seen as one batch and are copied.
    Transposing b changes no size. The factors' gradients come back as views of the batch's."""
    b, a = low(b), low(a)
    a, b = operand(_batched(a), copies[0]), operand(_batched(b), copies[1])
    return bmm(a, b, out_shape)


def _batched(x: Tensor) -> Tensor:
    return view_as(x, x.shape)


def _solve_triangular(system: Tensor, right: Tensor) -> Tensor:
    """torch.linalg.solve_triangular(system [..., C, C], right [..., C, W]): saves the system and the solution."""
    m = system.machine
    node = record(m, _solve_triangular_backward, (system, right), (system,), meta=system.shape)
    result = result_of(node, m, right.shape, right.dtype)
    _pointers(m, right.shape)
    save_result(node, result)
    return result


def _solve_triangular_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    saved = [node.unpack(i) for i in range(2)]
    d_right = m.empty(grad.shape, grad.dtype)
    _pointers(m, grad.shape)
    d_system = None
    if node.needs[0]:
        product = m.empty(node.meta, grad.dtype)
        negated = m.empty(node.meta, grad.dtype)
        del product
        d_system = m.empty(node.meta, grad.dtype)
        del negated
    del saved
    return d_system, d_right if node.needs[1] else None


def _pointers(m: Machine, shape: Shape) -> None:
    """What cuBLAS's batched solve is given: where each matrix lies, of the system and of the solution
    (aten/src/ATen/native/cuda/linalg/BatchLinearAlgebra.cpp `triangular_solve_batched_cublas`)."""
    num_matrices = prod(shape[:-2])
    if m.device.is_cuda and num_matrices > 8:  # up to that number they are solved one by one
        pointers = m.workspace(8 * num_matrices), m.workspace(8 * num_matrices)
        del pointers


def _copy_into(whole: Tensor, part: Tensor) -> Tensor:
    """whole[:, :, i] = part, on the storage of `whole`."""
    node = record(whole.machine, _copy_slices_backward, (whole, part), meta=(whole.shape, part.shape, part.dtype))
    return attach(node, Tensor(whole.storage, whole.shape, whole.dtype))


def _copy_slices_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    whole_shape, part_shape, part_dtype = node.meta
    d_whole = m.empty(whole_shape, grad.dtype)
    d_part = m.empty(part_shape, grad.dtype)
    zeros = m.empty(part_shape, grad.dtype) if node.needs[0] else None
    if part_dtype is not grad.dtype:
        d_part = m.empty(part_shape, part_dtype)
    del zeros
    return d_whole if node.needs[0] else None, d_part if node.needs[1] else None
