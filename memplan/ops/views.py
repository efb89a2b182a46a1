"""In-place operations on a view of a larger tensor: `x[1:] += y`, `x.permute(...) += y`.

The result is `x` itself, one place further in the graph. Backward (torch 2.11 torch/csrc/autograd/functions/tensor.cpp
`CopySlices::apply`) copies the whole gradient, and the view's part of it once more, on which the operation's own
backward works:

    x.view += y       nothing saved     / a whole and a part: the part is the gradient of y
    x[1:] = x[1:]     nothing saved     / a whole, a part, and for a moment zeros of a part; the slice on the right
                                          makes zeros of the whole
"""

from __future__ import annotations

from memplan.ops.autograd import Grads, Node, attach, record
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.tensor import Shape, Tensor


def add_to_view(x: Tensor, other: Tensor, shape: Shape) -> Tensor:
    """view += other, where `view` of `shape` is a view of x."""
    node = record(x.machine, _add_backward, (x, other), meta=(x.shape, shape))
    return x if node is None else attach(node, Tensor(x.storage, x.shape, x.dtype))


def _add_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    whole, part = node.meta
    return m.empty(whole, grad.dtype), m.empty(part, grad.dtype)


def set_item(x: Tensor, value: Tensor) -> Tensor:
    """x[slice] = value, which is that slice of x already: no byte moves, but the graph grows (`x[slice] += y` ends in
    `x.__setitem__(slice, ...)`)."""
    node = record(x.machine, _set_backward, (x, value), meta=(x.shape, value.shape))
    return x if node is None else attach(node, Tensor(x.storage, x.shape, x.dtype))


def _set_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    shape, part_shape = node.meta
    whole = m.empty(shape, grad.dtype)
    part = m.empty(part_shape, grad.dtype)
    zeros = m.empty(part_shape, grad.dtype) if node.needs[0] else None
    del zeros
    return whole if node.needs[0] else None, part if node.needs[1] else None
