"""Elementwise ops, reductions along the last dimension, casts, and the views that copy in backward.

One line each: what is saved / what backward allocates. Source: tools/autograd/derivatives.yaml and
torch/csrc/autograd/FunctionsManual.cpp of torch 2.11.

    add             nothing                     / nothing: both inputs get the incoming gradient itself
    sub             nothing                     / the negated gradient for the second
    mul             each factor, if the other one needs a gradient / one product per factor
    mul by number   nothing                     / one product
    to(dtype)       nothing                     / a cast back
    pow(2)          input                       / three temporaries of the input's size, one stays
    mean(-1)        nothing                     / one tensor of the input's size
    rsqrt           result                      / small: one value per row
    silu, gelu      input                       / one tensor
    relu, tanh      result                      / one tensor
    dropout         mask, one byte an element   / one tensor
    slice           nothing                     / zeros of the whole, filled
    cat             nothing                     / views
"""

from __future__ import annotations

from collections.abc import Sequence

from memplan.dtypes import DType
from memplan.ops.autograd import Backward, Grads, Node, attach, record, result_of, save_result
from memplan.ops.tensor import Shape, Tensor

GradList = list[Tensor | None]


def incoming(grads: GradList) -> Tensor:
    """The gradient of an op with one output."""
    grad = grads[0]
    assert grad is not None
    return grad


def promote(a: DType, b: DType) -> DType:
    """Result dtype of an op over two floating tensors (torch type promotion)."""
    if a is b or not b.is_floating:
        return a
    return b if not a.is_floating else DType.fp32


def broadcast(a: Shape, b: Shape) -> Shape:
    if a == b:
        return a
    width = max(len(a), len(b))
    a, b = (1,) * (width - len(a)) + a, (1,) * (width - len(b)) + b
    return tuple([max(m, n) for m, n in zip(a, b, strict=True)])


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    m = a.machine
    node = record(m, _add_backward, (a, b))
    return result_of(node, m, broadcast(a.shape, b.shape), promote(a.dtype, b.dtype))


def _add_backward(node: Node, grads: GradList) -> Grads:
    grad = incoming(grads)
    return [grad if needed else None for needed in node.needs]


def sub(a: Tensor, b: Tensor) -> Tensor:
    """a - b where b needs a gradient too: a product of its own, the negated one."""
    m = a.machine
    node = record(m, _sub_backward, (a, b))
    return result_of(node, m, broadcast(a.shape, b.shape), promote(a.dtype, b.dtype))


def _sub_backward(node: Node, grads: GradList) -> Grads:
    grad = incoming(grads)
    return grad if node.needs[0] else None, node.machine.empty(grad.shape, grad.dtype) if node.needs[1] else None


def add_number(x: Tensor) -> Tensor:
    """x + number, x - number."""
    m = x.machine
    return result_of(record(m, _add_backward, (x,)), m, x.shape, x.dtype)


def mul(a: Tensor, b: Tensor) -> Tensor:
    m = a.machine
    node = None
    if m.grad_enabled and (a.requires_grad or b.requires_grad):
        # derivatives.yaml mul.Tensor: `other` for the gradient of self, `self` for that of other
        saved = ([b] if a.requires_grad else []) + ([a] if b.requires_grad else [])
        node = record(m, _mul_backward, (a, b), saved)
    return result_of(node, m, broadcast(a.shape, b.shape), promote(a.dtype, b.dtype))


def _mul_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    saved = [node.unpack(i) for i in range(len(node.saved))]
    for_a = for_b = None
    if node.needs[1]:
        a = saved[-1]
        for_b = m.empty(broadcast(grad.shape, a.shape), promote(grad.dtype, a.dtype))
    if node.needs[0]:
        b = saved[0]
        for_a = m.empty(broadcast(grad.shape, b.shape), promote(grad.dtype, b.dtype))
    return for_a, for_b


def mul_number(x: Tensor) -> Tensor:
    """x * number, x / number: the number stays on the host and is not packed."""
    m = x.machine
    return result_of(record(m, same_size_backward, (x,)), m, x.shape, x.dtype)


def mul_number_in_place(x: Tensor) -> Tensor:
    """x *= number, x /= number: the same storage, one place further in the graph."""
    return attach(record(x.machine, same_size_backward, (x,)), Tensor(x.storage, x.shape, x.dtype))


def mul_in_place(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, a tensor that needs no gradient: it is saved."""
    return attach(record(x.machine, _mul_backward, (x, factor), (factor,)), Tensor(x.storage, x.shape, x.dtype))


def same_size_backward(node: Node, grads: GradList) -> Grads:
    """One new tensor of the incoming gradient's size."""
    grad = incoming(grads)
    if node.saved:
        held = node.unpack(0)
        out = node.machine.empty(grad.shape, grad.dtype)
        del held
        return (out,)
    return (node.machine.empty(grad.shape, grad.dtype),)


def neg(x: Tensor) -> Tensor:
    m = x.machine
    return result_of(record(m, same_size_backward, (x,)), m, x.shape, x.dtype)


def to(x: Tensor, dtype: DType) -> Tensor:
    """`x.to(dtype)`: the tensor itself when it has that dtype already."""
    if x.dtype is dtype:
        return x
    m = x.machine
    return result_of(record(m, _to_backward, (x,), meta=x.dtype), m, x.shape, dtype)


def _to_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(incoming(grads).shape, node.meta),)


def clone(x: Tensor) -> Tensor:
    """A copy; backward passes the gradient through."""
    m = x.machine
    return result_of(record(m, _add_backward, (x,)), m, x.shape, x.dtype)


def saves_input(x: Tensor, backward: Backward = same_size_backward) -> Tensor:
    """silu, gelu and the like: one result, the input saved."""
    m = x.machine
    return result_of(record(m, backward, (x,), (x,)), m, x.shape, x.dtype)


def saves_result(x: Tensor, backward: Backward = same_size_backward) -> Tensor:
    """relu, tanh, sigmoid, exp: one result, which is saved."""
    m = x.machine
    node = record(m, backward, (x,))
    result = result_of(node, m, x.shape, x.dtype)
    save_result(node, result)
    return result


def pow_number(x: Tensor) -> Tensor:
    """x ** number, in fp32 under autocast."""
    if x.machine.autocast and x.dtype.is_half:
        x = to(x, DType.fp32)
    return saves_input(x, _pow_backward)


def _pow_backward(node: Node, grads: GradList) -> Grads:
    # FunctionsManual.cpp pow_backward: grad * (exponent * self.pow(exponent - 1)), one expression
    x, m = node.unpack(), node.machine
    power = m.empty(x.shape, x.dtype)
    scaled = m.empty(x.shape, x.dtype)
    out = m.empty(x.shape, x.dtype)
    del power, scaled
    return (out,)


def mean_last(x: Tensor) -> Tensor:
    """x.mean(-1, keepdim=True)."""
    m = x.machine
    return result_of(record(m, _mean_backward, (x,), meta=x.shape), m, (*x.shape[:-1], 1), x.dtype)


def _mean_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def rsqrt(x: Tensor) -> Tensor:
    return saves_result(x, _rsqrt_backward)


def _rsqrt_backward(node: Node, grads: GradList) -> Grads:
    # -0.5 * grad * result.pow(3)
    result, m = node.unpack(), node.machine
    scaled = m.empty(result.shape, result.dtype)
    cubed = m.empty(result.shape, result.dtype)
    out = m.empty(result.shape, result.dtype)
    del scaled, cubed
    return (out,)


def dropout(x: Tensor, p: float) -> Tensor:
    """native_dropout in training: a mask of one byte an element, and the result; the tensor itself when p is 0.

    Source: aten/src/ATen/native/Dropout.cpp `is_fused_kernel_acceptable`, native/cuda/Dropout.cu.
    """
    if not p:
        return x
    m = x.machine
    node = record(m, same_size_backward, (x,))
    mask = m.empty(x.shape, DType.bool8)
    result = m.empty(x.shape, x.dtype)
    attach(node, result)
    save_result(node, mask)
    return result


def slice_last(x: Tensor, width: int) -> Tensor:
    """A view of `width` of the last dimension; backward writes it into zeros of the whole."""
    m = x.machine
    node = record(m, _slice_backward, (x,), meta=x.shape)
    return attach(node, Tensor(x.storage, (*x.shape[:-1], width), x.dtype))


def _slice_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def split_last(x: Tensor, *widths: int) -> list[Tensor]:
    """x.split / x.chunk along the last dimension: views; backward concatenates (SplitBackward: one tensor)."""
    m = x.machine
    node = record(m, _split_backward, (x,), meta=(x.shape, x.dtype, [(*x.shape[:-1], w) for w in widths]))
    return [attach(node, Tensor(x.storage, (*x.shape[:-1], w), x.dtype), i) for i, w in enumerate(widths)]


def _split_backward(node: Node, grads: GradList) -> Grads:
    shape, dtype, parts = node.meta
    # split_with_sizes_backward makes zeros for the parts that got no gradient, then concatenates
    missing = [node.machine.empty(part, dtype) for i, part in enumerate(parts) if i >= len(grads) or grads[i] is None]
    out = node.machine.empty(shape, dtype)
    del missing
    return (out,)


def cat_last(tensors: Sequence[Tensor]) -> Tensor:
    """torch.cat(tensors, dim=-1); backward gives each a view of the gradient."""
    m = tensors[0].machine
    node = record(m, _cat_backward, tensors, meta=[t.shape for t in tensors])
    first = tensors[0]
    dtype = first.dtype
    for t in tensors[1:]:
        dtype = promote(dtype, t.dtype)
    return result_of(node, m, (*first.shape[:-1], sum(t.shape[-1] for t in tensors)), dtype)


def _cat_backward(node: Node, grads: GradList) -> Grads:
    grad = incoming(grads)
    return [
        Tensor(grad.storage, shape, grad.dtype) if needed else None
        for shape, needed in zip(node.meta, node.needs, strict=True)
    ]


def stack_last(tensors: Sequence[Tensor]) -> Tensor:
    """torch.stack(tensors, dim=-1).flatten(-2); backward gives each a view of the gradient."""
    return cat_last(tensors)


def repeat_interleave_last(x: Tensor, width: int) -> Tensor:
    """x.repeat_interleave(n, dim=-1), `width` wide then: a copy."""
    m = x.machine
    return m.empty((*x.shape[:-1], width), x.dtype)


def expand_copy(x: Tensor, shape: Shape) -> Tensor:
    """x.expand(...).reshape(...) where the reshape must copy (repeat_kv); backward sums the copies."""
    m = x.machine
    node = record(m, _expand_backward, (x,), meta=x.shape)
    return result_of(node, m, shape, x.dtype)


def expand_view(x: Tensor, shape: Shape) -> Tensor:
    """x.expand(...), a view; backward sums over what was repeated."""
    node = record(x.machine, _expand_backward, (x,), meta=x.shape)
    return attach(node, Tensor(x.storage, shape, x.dtype))


def _expand_backward(node: Node, grads: GradList) -> Grads:
    return (node.machine.empty(node.meta, incoming(grads).dtype),)


def contiguous(x: Tensor) -> Tensor:
    """`.contiguous()` of a tensor that is not: a copy; backward passes the gradient through."""
    return clone(x)


def copied_in_backward(x: Tensor, shape: Shape) -> Tensor:
    """A view whose gradient has to be copied into another memory order (ViewBackward0 -> reshape -> clone)."""
    return attach(record(x.machine, same_size_backward, (x,)), Tensor(x.storage, shape, x.dtype))


def clip_in_place(x: Tensor) -> Tensor:
    """x.clamp_(min, max): autograd keeps a copy of what it was."""
    m = x.machine
    node = None
    if m.grad_enabled and x.requires_grad:
        node = record(m, _clip_backward, (x,), (m.empty(x.shape, x.dtype),))
    return attach(node, Tensor(x.storage, x.shape, x.dtype))


def _clip_backward(node: Node, grads: GradList) -> Grads:
    # FunctionsManual.cpp clamp_backward: where((self >= min).logical_and_(self <= max), grad, zero)
    grad, x, m = incoming(grads), node.unpack(), node.machine
    zero = m.empty((), grad.dtype)
    above, below = m.empty(x.shape, DType.bool8), m.empty(x.shape, DType.bool8)
    del below, x
    out = m.empty(grad.shape, grad.dtype)
    del zero, above
    return (out,)


def add_in_place(x: Tensor, other: Tensor) -> Tensor:
    """x += other on the storage of x."""
    m = x.machine
    node = record(m, _add_backward, (x, other))
    return attach(node, Tensor(x.storage, x.shape, x.dtype)) if node is not None else x
