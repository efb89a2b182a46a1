"""torch.clamp (torch 2.11 derivatives.yaml, FunctionsManual.cpp `clamp_backward`).

forward     the result, as large as x; saves x until its backward has run
backward    a zero, one boolean of x's shape a bound (1 B an element), the gradient; all but the last die at once
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, record, result_of
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.tensor import Tensor


def clamp(x: Tensor, *, num_bounds: int) -> Tensor:
    """x.clamp(min, max), or one of the two."""
    m = x.machine
    return result_of(record(m, _clamp_backward, (x,), (x,), meta=num_bounds), m, x.shape, x.dtype)


def _clamp_backward(node: Node, grads: GradList) -> Grads:
    """FunctionsManual.cpp `clamp_backward`: where(x >= min and x <= max, grad, 0)"""
    grad, m = incoming(grads), node.machine
    x = node.unpack()
    zero = m.empty((), grad.dtype)
    inside = [m.empty(x.shape, DType.bool8) for _ in range(node.meta)]
    out = m.empty(grad.shape, grad.dtype)
    del x, inside, zero
    return (out,)
