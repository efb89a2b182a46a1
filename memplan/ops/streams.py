"""Ops over tensors that lie one behind the other, [streams, B, S, hidden], and over their magnitudes.

    stack       nothing                     / views of the gradient
    repeat      nothing                     / one tensor of the input's size
    mean(0)     nothing                     / one tensor of the input's size
    x / y       both, y if x alone needs    / three temporaries and one tensor for y, one for x
                a gradient
    sqrt        result                      / two of the input's size, one stays
    maximum     both                        / booleans and one tensor

saved / allocated in backward. Source: torch 2.11 tools/autograd/derivatives.yaml, FunctionsManual.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, record, result_of
from memplan.ops.pointwise import GradList, broadcast, incoming, promote, saves_result
from memplan.ops.rows import divide_backward
from memplan.ops.tensor import Tensor


def stack_first(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack(tensors): [streams, ...] in the widest dtype."""
    m, shape = tensors[0].machine, tensors[0].shape
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = promote(dtype, tensor.dtype)
    node = record(m, _unbind_backward, tensors, meta=shape)
    return result_of(node, m, (len(tensors), *shape), dtype)


def _unbind_backward(node: Node, grads: GradList) -> Grads:
    grad, found = incoming(grads), []
    for needed in node.needs:
        view = Tensor(grad.storage, node.meta, grad.dtype) if needed else None
        if view is not None:
            view.is_reshaped = True
        found.append(view)
    return found


def repeat_first(x: Tensor, num: int) -> Tensor:
    """x.repeat(num, 1, ...): [num, *x.shape]."""
    m = x.machine
    return result_of(record(m, _like_input, (x,), meta=x.shape), m, (num, *x.shape), x.dtype)


def mean_first(x: Tensor) -> Tensor:
    """x.mean(0)."""
    m = x.machine
    return result_of(record(m, _like_input, (x,), meta=x.shape), m, x.shape[1:], x.dtype)


def _like_input(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def divide(x: Tensor, divisor: Tensor) -> Tensor:
    """x / divisor."""
    m = x.machine
    node = None
    if m.grad_enabled and (x.requires_grad or divisor.requires_grad):
        node = record(m, divide_backward, (x, divisor), (divisor, x) if divisor.requires_grad else (divisor,))
    return result_of(node, m, broadcast(x.shape, divisor.shape), promote(x.dtype, divisor.dtype))


def sqrt(x: Tensor) -> Tensor:
    """Saves its result."""
    return saves_result(x, _sqrt_backward)


def _sqrt_backward(node: Node, grads: GradList) -> Grads:
    """grad / (2 * result)"""
    grad, m = incoming(grads), node.machine
    result = node.unpack()
    doubled = m.empty(result.shape, result.dtype)
    out = m.empty(grad.shape, grad.dtype)
    del doubled, result
    return (out,)


def maximum(x: Tensor, least: Tensor) -> Tensor:
    """torch.maximum of x and a scalar on the device that needs no gradient."""
    m = x.machine
    return result_of(record(m, _maximum_backward, (x,), (x, least)), m, x.shape, x.dtype)


def _maximum_backward(node: Node, grads: GradList) -> Grads:
    """at::where(x == least, grad / 2, grad).masked_fill_(x < least, 0)"""
    grad, m = incoming(grads), node.machine
    x, least = node.unpack(0), node.unpack(1)
    equal = m.empty(x.shape, DType.bool8)
    half = m.empty(grad.shape, grad.dtype)
    out = m.empty(grad.shape, grad.dtype)
    del half, equal
    less = m.empty(x.shape, DType.bool8)
    del less, x, least
    return (out,)
