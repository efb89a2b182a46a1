"""Selecting and scattering by a boolean mask, as CUDA runs it.

Sources, torch 2.11: aten/src/ATen/native/TensorAdvancedIndexing.cpp (`index`, `index_put_`), cuda/Nonzero.cu,
cuda/IndexKernel.cpp (`masked_select`, `masked_scatter_`), cuda/Indexing.cu (`index_put_with_sort_kernel`),
tools/autograd/derivatives.yaml. Both ops save the mask alone.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, attach, record
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.tensor import Machine, Shape, Tensor


def slice_tokens(x: Tensor, num_tokens: int) -> Tensor:
    """x[:, :num_tokens] of [B, S, H], a view; backward writes into zeros of the whole."""
    node = record(x.machine, _slice_backward, (x,), meta=x.shape)
    return attach(node, Tensor(x.storage, (x.shape[0], num_tokens, *x.shape[2:]), x.dtype))


def _slice_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def select_rows(x: Tensor, mask: Tensor, num_selected: int) -> Tensor:
    """x[mask], with `mask` over the first dimensions of x and `num_selected` of it true: [num_selected, ...]."""
    m = x.machine
    node = record(m, _select_backward, (x,), (mask,) if x.requires_grad else (), meta=x.shape)
    indices = nonzero(m, len(mask.shape), num_selected)
    result = m.empty((num_selected, *x.shape[len(mask.shape) :]), x.dtype)
    del indices
    return attach(node, result)


def nonzero(m: Machine, num_dims: int, num_selected: int) -> Tensor:
    """Indices of the true values of a mask, one row a dimension of it: int64."""
    count = m.workspace(4)
    result = m.empty((num_dims, num_selected), DType.int64)
    del count
    return result


def _select_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    shape: Shape = node.meta
    mask = node.unpack()
    out = m.empty(shape, grad.dtype)
    _index_put_by_sorting(m, len(mask.shape), grad.shape[0])
    del mask
    return (out,)


def _index_put_by_sorting(m: Machine, num_dims: int, num_indices: int) -> None:
    """index_put_(accumulate=True): the indices made linear and sorted, beside where they were."""
    indices = nonzero(m, num_dims, num_indices)
    linear = m.empty((num_indices,), DType.int64)
    ordered, positions = m.empty((num_indices,), DType.int64), m.empty((num_indices,), DType.int64)
    counted = m.empty((num_indices,), DType.int64)
    del indices, linear, ordered, positions, counted


def masked_scatter(mask: Tensor, source: Tensor) -> Tensor:
    """source.new_zeros(mask.shape).masked_scatter(mask, source)."""
    m = mask.machine
    zeros = m.empty(mask.shape, source.dtype)
    node = record(m, _masked_scatter_backward, (source,), (mask,) if source.requires_grad else (), meta=source.shape)
    result = attach(node, m.empty(mask.shape, source.dtype))  # out of place: a clone, then in place
    prefix_sum = m.empty(mask.shape, DType.int64)
    del prefix_sum, zeros
    return result


def _masked_scatter_backward(node: Node, grads: GradList) -> Grads:
    """masked_select of the incoming gradient."""
    grad, m = incoming(grads), node.machine
    mask = node.unpack()
    indices = nonzero(m, len(mask.shape), node.meta[0])
    out = m.empty(node.meta, grad.dtype)
    del indices, mask
    return (out,)
