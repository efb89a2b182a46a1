"""Matrix products: nn.Linear, Conv1D, batched matmul.

x @ W.T     saves the input if W trains, and W (no bytes: it is a parameter) if the input needs a gradient;
            backward allocates dW first, then dx (MmBackward0, torch 2.11 tools/autograd/derivatives.yaml)
+ bias      addmm: the same but dx first (AddmmBackward0; the generated code goes by argument name: mat1, mat2),
            and the bias gradient is a sum of the incoming gradient
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.ops.autocast import low
from memplan.ops.autograd import Grads, Node, attach, record, result_of
from memplan.ops.pointwise import GradList, add, copied_in_backward, incoming
from memplan.ops.tensor import Parameter, Tensor


@dataclass(slots=True)
class Linear:
    """nn.Linear(in_features, out_features): weight [out, in] and an optional bias [out].

    `transposed` is transformers' Conv1D: the same product with the weight stored [in, out].
    """

    in_features: int
    out_features: int
    weight: Parameter
    bias: Parameter | None = None
    copies_gradient: bool = field(default=False, kw_only=True)
    """The gradient of [B, S, out] does not lie token by token, and is copied to be seen as [B * S, out]."""

    def __call__(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.bias, self.out_features)
        return copied_in_backward(out, out.shape) if self.copies_gradient and len(out.shape) > 2 else out

    def parameters(self) -> list[Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


@dataclass(slots=True)
class MatmulLinear(Linear):
    """falcon's linear layer, input @ weight.T + bias: the bias is added apart, and autocast does not keep the cast of a
    transposed weight, which is a view. bitsandbytes leaves this class alone."""

    def __call__(self, x: Tensor) -> Tensor:
        hidden_states = linear(x, transposed(self.weight), None, self.out_features)
        return hidden_states if self.bias is None else add(hidden_states, self.bias)


def transposed(weight: Tensor) -> Tensor:
    """weight.T"""
    node = record(weight.machine, _transposed_backward, (weight,))
    return attach(node, Tensor(weight.storage, weight.shape, weight.dtype))


def _transposed_backward(node: Node, grads: GradList) -> Grads:
    return (incoming(grads),)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """F.linear: [..., in] -> [..., out]."""
    m = x.machine
    # the casts are arguments of one call, which the compiler evaluates from the last to the first
    bias = None if bias is None else low(bias)
    weight = low(weight)
    x = low(x)
    inputs: tuple[Tensor, ...] = (x, weight) if bias is None else (x, weight, bias)
    node = None
    if m.grad_enabled:
        saved = ([x] if weight.requires_grad else []) + ([weight] if x.requires_grad else [])
        node = record(m, _linear_backward, inputs, saved, meta=(x.shape, weight.shape))
    result = result_of(node, m, (*x.shape[:-1], out_features), x.dtype)
    m.calls("cublas")
    if bias is not None:
        m.calls("cublaslt")
    return result


def _linear_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    x_shape, weight_shape = node.meta
    saved = [node.unpack(i) for i in range(len(node.saved))]
    has_bias = len(node.needs) == 3
    d_x = m.empty(x_shape, grad.dtype) if has_bias and node.needs[0] else None
    d_weight = m.empty(weight_shape, grad.dtype) if node.needs[1] else None
    if d_weight is not None:
        m.calls("cublas")
    if not has_bias and node.needs[0]:
        d_x = m.empty(x_shape, grad.dtype)
    if d_x is not None:
        d_x.is_reshaped = len(x_shape) > 2
        m.calls("cublas")
    del saved
    # the engine sums the incoming gradient down to the bias
    return (d_x, d_weight, grad if node.needs[2] else None) if has_bias else (d_x, d_weight)


def bmm(a: Tensor, b: Tensor, out_shape: tuple[int, ...]) -> Tensor:
    """torch.matmul of two batched tensors: each is saved if the other needs a gradient."""
    m = a.machine
    b, a = low(b), low(a)
    node = None
    if m.grad_enabled and (a.requires_grad or b.requires_grad):
        saved = ([b] if a.requires_grad else []) + ([a] if b.requires_grad else [])
        node = record(m, _bmm_backward, (a, b), saved, meta=(a.shape, b.shape))
    result = result_of(node, m, out_shape, a.dtype)
    m.calls("cublas")
    return result


def _bmm_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    saved = [node.unpack(i) for i in range(len(node.saved))]
    d_b = m.empty(node.meta[1], grad.dtype) if node.needs[1] else None
    d_a = m.empty(node.meta[0], grad.dtype) if node.needs[0] else None
    del saved
    return d_a, d_b


def baddbmm(bias: Tensor, a: Tensor, b: Tensor, out_shape: tuple[int, ...]) -> Tensor:
    """torch.baddbmm(bias, a, b, alpha=number) with a bias that needs no gradient: bmm, whose gradients are scaled into
    tensors of their own (BaddbmmBackward0: `maybe_multiply(..., alpha)`, batch1 before batch2)."""
    m = a.machine
    b, a, bias = low(b), low(a), low(bias)
    node = None
    if m.grad_enabled and (a.requires_grad or b.requires_grad):
        saved = ([a] if b.requires_grad else []) + ([b] if a.requires_grad else [])
        node = record(m, _baddbmm_backward, (a, b), saved, meta=(a.shape, b.shape))
    result = result_of(node, m, out_shape, a.dtype)
    m.calls("cublas")
    return result


def _baddbmm_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    saved = [node.unpack(i) for i in range(len(node.saved))]
    out: list[Tensor | None] = []
    for shape, needed in zip(node.meta, node.needs, strict=True):
        product = m.empty(shape, grad.dtype) if needed else None
        out.append(m.empty(shape, grad.dtype) if needed else None)
        del product
    del saved
    return out
