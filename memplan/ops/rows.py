"""Ops that select and reorder rows: index, sort, top-k, gather, masks, and sums over a small inner dimension.

    index        the index                      / zeros of the whole, into which index_put_ adds
    masked_fill  the mask                       / one tensor; in place forward allocates nothing
    top-k        the indices                    / zeros of the whole, into which scatter_ writes
    gather       the index                      / zeros of the whole, into which scatter_add_ writes
    scatter_     the index                      / what is gathered of the gradient
    /=           the divisor, a copy of itself  / five small ones
    sum(dim)     nothing                        / the gradient expanded, copied where it is reshaped next

saved / allocated in backward. Source: torch 2.11 tools/autograd/derivatives.yaml, FunctionsManual.cpp; the kernels'
own buffers: aten/src/ATen/native/cuda/Indexing.cu `index_put_with_sort_kernel`, Sort.cpp, ScanKernels.cpp.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, attach, record, result_of, save_result
from memplan.ops.pointwise import GradList, incoming, same_size_backward
from memplan.ops.tensor import Machine, Shape, Tensor

_SCAN_BYTES = 1023
"""What CUB asks for to scan one tile (`InclusiveScan` of DeviceScan, an allocation trace of an H200)."""


def flatten_tokens(x: Tensor) -> Tensor:
    """x.view(-1, x.shape[-1])"""
    return view_as(x, (x.numel // x.shape[-1], x.shape[-1]))


def view_as(x: Tensor, shape: Shape, *, copies_gradient: bool = False) -> Tensor:
    """x.view(shape): a view with a node of its own, so that gradients meet there and come back as a view, or as a copy
    where they do not lie as x does."""
    node = record(x.machine, _view_backward, (x,), meta=(x.shape, copies_gradient))
    return attach(node, Tensor(x.storage, shape, x.dtype))


def _view_backward(node: Node, grads: GradList) -> Grads:
    grad = incoming(grads)
    shape, copies = node.meta
    if copies:
        return (node.machine.empty(shape, grad.dtype),)
    view = Tensor(grad.storage, shape, grad.dtype)
    view.is_reshaped = True
    return (view,)


def index_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] with a one-dimensional index: [len(index), ...]."""
    m = x.machine
    node = record(m, _index_backward, (x,), (index,), meta=x.shape)
    return result_of(node, m, (index.shape[0], *x.shape[1:]), x.dtype)


def index_elements(x: Tensor, index: Tensor) -> Tensor:
    """x[index] of a one-dimensional x: one element for each entry of the index."""
    m = x.machine
    node = record(m, _index_backward, (x,), (index,), meta=x.shape)
    return result_of(node, m, index.shape, x.dtype)


def index_last_heads(x: Tensor, shape: Shape) -> Tensor:
    """x[..., [i], :], a copy of `shape`; the index is a list, which goes to the device as a tensor."""
    m = x.machine
    index = m.empty((1,), DType.int64)
    node = record(m, _index_backward, (x,), (index,), meta=x.shape)
    return result_of(node, m, shape, x.dtype)


def _index_backward(node: Node, grads: GradList) -> Grads:
    m, index = node.machine, node.unpack()
    out = m.empty(node.meta, incoming(grads).dtype)
    if m.device.is_cuda:
        _put_with_sort(m, index.shape)
    return (out,)


def _put_with_sort(m: Machine, shape: Shape) -> None:
    """index_put_(accumulate=True): the indices made linear, then sorted so that equal ones are added in order."""
    wrapped = m.empty(shape, DType.int64)
    linear = m.empty(shape, DType.int64)
    del wrapped
    by_index = m.empty(shape, DType.int64)
    order = m.empty(shape, DType.int64)
    counted = m.empty(shape, DType.int64)
    scratch = m.workspace(1)
    del scratch, counted, order, by_index, linear


def sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """torch.sort of a one-dimensional integer tensor: values and indices."""
    m = x.machine
    values, indices = m.empty(x.shape, x.dtype), m.empty(x.shape, DType.int64)
    if m.device.is_cuda:
        counted = m.empty(x.shape, DType.int64)
        del counted
    return values, indices


def cumulative_sum(m: Machine, shape: Shape, dtype: DType) -> Tensor:
    """torch.cumsum(..., dtype=...) of a short one-dimensional tensor."""
    out = m.empty(shape, dtype)
    if m.device.is_cuda:
        scratch = m.workspace(_SCAN_BYTES)
        del scratch
    return out


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk(x, k, dim=-1): values in x's dtype and int64 indices, both [..., k]."""
    m = x.machine
    node = record(m, _scatter_backward, (x,), meta=x.shape)
    shape = (*x.shape[:-1], k)
    values = result_of(node, m, shape, x.dtype)
    indices = m.empty(shape, DType.int64)
    save_result(node, indices)
    return values, indices


def gather_last(x: Tensor, index: Tensor) -> Tensor:
    """x.gather(-1, index)."""
    m = x.machine
    node = record(m, _scatter_backward, (x,), (index,), meta=x.shape)
    return result_of(node, m, index.shape, x.dtype)


def _scatter_backward(node: Node, grads: GradList) -> Grads:
    index = node.unpack()
    out = node.machine.empty(node.meta, incoming(grads).dtype)
    del index
    return (out,)


def scatter_in_place(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """x.scatter_(-1, index, source), x needing no gradient: the same storage; backward gathers."""
    node = record(x.machine, _gather_backward, (source,), (index,))
    return attach(node, Tensor(x.storage, x.shape, x.dtype))


def _gather_backward(node: Node, grads: GradList) -> Grads:
    index = node.unpack()
    out = node.machine.empty(index.shape, incoming(grads).dtype)
    del index
    return (out,)


def select(x: Tensor, shape: Shape) -> Tensor:
    """One entry of a dimension of x, a view of `shape`; backward writes into zeros of the whole (select_backward)."""
    node = record(x.machine, _select_backward, (x,), meta=x.shape)
    return attach(node, Tensor(x.storage, shape, x.dtype))


def _select_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """x.masked_fill(mask, number)."""
    m = x.machine
    return result_of(record(m, same_size_backward, (x,), (mask,)), m, x.shape, x.dtype)


def masked_fill_in_place(x: Tensor, mask: Tensor) -> Tensor:
    """x.masked_fill_(mask, number): the same storage, one place further in the graph."""
    node = record(x.machine, same_size_backward, (x,), (mask,))
    return attach(node, Tensor(x.storage, x.shape, x.dtype))


def divide_in_place(x: Tensor, divisor: Tensor) -> Tensor:
    """x /= divisor, the divisor broadcast along the last dimension."""
    m = x.machine
    node = record(m, divide_backward, (x, divisor), (divisor,))
    if node is not None and divisor.requires_grad:
        save_result(node, m.empty(x.shape, x.dtype))  # what x was, for the divisor's gradient
    return attach(node, Tensor(x.storage, x.shape, x.dtype))


def divide_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    saved = [node.unpack(i) for i in range(len(node.saved))]
    d_divisor = None
    if node.needs[1]:  # -grad * ((x / divisor) / divisor)
        once = m.empty(grad.shape, grad.dtype)
        twice = m.empty(grad.shape, grad.dtype)
        negated = m.empty(grad.shape, grad.dtype)
        d_divisor = m.empty(grad.shape, grad.dtype)
        del negated, twice, once
    d_x = m.empty(grad.shape, grad.dtype) if node.needs[0] else None
    del saved
    return d_x, d_divisor


def sum_last(x: Tensor) -> Tensor:
    """x.sum(-1, keepdim=True); the gradient comes back as an expanded view."""
    m = x.machine
    node = record(m, _expand_view, (x,), meta=x.shape)
    return result_of(node, m, (*x.shape[:-1], 1), _dtype_of_sum(x))


def _expand_view(node: Node, grads: GradList) -> Grads:
    grad = incoming(grads)
    return (Tensor(grad.storage, node.meta, grad.dtype),)


def sum_groups(x: Tensor, num_groups: int) -> Tensor:
    """x.view(num_groups, -1, width).sum(1) of x [rows, width]; the expanded gradient is copied into [rows, width]."""
    m = x.machine
    dtype = _dtype_of_sum(x)
    node = record(m, _repeat_backward if dtype is x.dtype else _expand_view, (x,), meta=x.shape)
    return result_of(node, m, (num_groups, x.shape[-1]), dtype)


def _dtype_of_sum(x: Tensor) -> DType:
    """fp32 under autocast; the kernel reads half precision itself, and the engine casts the expanded gradient back."""
    return DType.fp32 if x.machine.autocast and x.dtype.is_half else x.dtype


def _repeat_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)
