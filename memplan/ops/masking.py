"""Selecting and scattering by a boolean mask, as CUDA runs it.

Sources, torch 2.11: aten/src/ATen/native/TensorAdvancedIndexing.cpp (`index`, `index_put_`), cuda/Nonzero.cu,
cuda/IndexKernel.cpp (`masked_select`, `masked_scatter_`), cuda/Indexing.cu (`index_put_with_sort_kernel`),
tools/autograd/derivatives.yaml. Both ops save the mask alone.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, attach, record
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.tensor import Machine, Tensor


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
    indices = _nonzero(mask, num_selected)
    result = m.empty((num_selected, *x.shape[len(mask.shape) :]), x.dtype)
    del indices
    return attach(node, result)


def _nonzero(mask: Tensor, num_selected: int) -> Tensor:
    """Indices of the true values of `mask`, int64, one row a dimension of it (`nonzero_cuda_out_impl`)."""
    m = mask.machine
    count = m.workspace(4) if m.device.is_cuda else None
    _scratch(m, 1 if mask.numel <= _ONE_TILE_OF_A_SUM else _PARTIAL_SUMS_BYTES)
    result = m.empty((len(mask.shape), num_selected), DType.int64)
    _scratch(m, _SELECT_BYTES)
    del count
    return result


# cub's temporary storage, as H200 traces of 1,022 to 5,118 tokens show it. A sum over more than 256 threads of 16
# values puts partial sums of 5 waves of 8 blocks a multiprocessor in memory (cub/device/dispatch/dispatch_reduce.cuh).
_ONE_TILE_OF_A_SUM = 4096
_PARTIAL_SUMS_BYTES = 21_503
_SELECT_BYTES = 1_023
_SCAN_BYTES = 1_279
# A radix sort of more than 256 threads of 9 keys takes a second copy of keys and values
# (cub/device/dispatch/dispatch_radix_sort.cuh).
_ONE_TILE_OF_A_SORT = 2304


def _scratch(m: Machine, num_bytes: int) -> None:
    if m.device.is_cuda:
        m.workspace(num_bytes)


def _select_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    mask = node.unpack()
    out = m.empty(node.meta, grad.dtype)
    _add_by_index(mask, grad.shape[0])
    del mask
    return (out,)


def _add_by_index(mask: Tensor, num_indices: int) -> None:
    """index_put_(accumulate=True): the indices of each dimension made one, and sorted with where they were."""
    m = mask.machine
    if not m.device.is_cuda:
        return
    shape = (num_indices,)
    indices = _nonzero(mask, num_indices)
    linear = None
    for _ in mask.shape:
        remainder = m.empty(shape, DType.int64)
        scaled = m.empty(shape, DType.int64)
        del remainder
        linear = linear or scaled
        del scaled
    del indices
    ordered, positions = m.empty(shape, DType.int64), m.empty(shape, DType.int64)
    counted = m.empty(shape, DType.int64)
    _scratch(m, 1 if num_indices <= _ONE_TILE_OF_A_SORT else 16 * num_indices)
    del linear, ordered, positions, counted


def masked_scatter(mask: Tensor, source: Tensor) -> Tensor:
    """source.new_zeros(mask.shape).masked_scatter(mask, source)."""
    m = mask.machine
    zeros = m.empty(mask.shape, source.dtype)
    node = record(m, _masked_scatter_backward, (source,), (mask,) if source.requires_grad else (), meta=source.shape)
    result = attach(node, m.empty(mask.shape, source.dtype))  # out of place: a clone, then in place
    prefix_sum = m.empty(mask.shape, DType.int64)
    _scratch(m, _SCAN_BYTES)
    del prefix_sum, zeros
    return result


def _masked_scatter_backward(node: Node, grads: GradList) -> Grads:
    """masked_select of the incoming gradient."""
    grad, m = incoming(grads), node.machine
    mask = node.unpack()
    indices = _nonzero(mask, node.meta[0])
    out = m.empty(node.meta, grad.dtype)
    del indices, mask
    return (out,)


def count_true(mask: Tensor) -> Tensor:
    """mask.sum() of booleans: a scalar, by way of an int64 copy."""
    m = mask.machine
    result = m.empty((), DType.int64)
    m.empty(mask.shape, DType.int64)
    return result
