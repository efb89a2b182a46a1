"""Activations of the MLP by their Hugging Face name (transformers 5.17 activations.py `ACT2FN`).

What each saves decides the memory of the MLP, for x [B, S, I] in the stream's dtype, until its backward has run:

    silu, gelu, gelu_pytorch_tanh   x                                      one kernel (torch 2.11 derivatives.yaml)
    relu, tanh, sigmoid             the result                             the same
    gelu_new                        x, x/2, tanh, 1 + tanh                 op by op: three tensors beside the input
    gelu_fast                       x, 0.8 x, 0.04 x, 1 + 0.04 x x, tanh,  op by op: six beside the input
                                    x/2, 1 + tanh
    bloom_gelu                      x                                      recomputed op by op in backward
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.ops.autograd import Grads, Node, attach, record, save_result
from memplan.ops.pointwise import (
    GradList,
    add,
    add_number,
    incoming,
    mul,
    mul_number,
    pow_number,
    saves_input,
    saves_result,
)
from memplan.ops.tensor import Tensor


def gelu_new(x: Tensor) -> Tensor:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))), op by op (`NewGELUActivation`)."""
    # nested as there, so that each intermediate dies with the expression that takes it
    return mul(mul_number(x), add_number(saves_result(mul_number(add(x, mul_number(pow_number(x)))))))


def gelu_fast(x: Tensor) -> Tensor:
    """0.5 * x * (1 + tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))) (`FastGELUActivation`)."""
    return mul(mul_number(x), add_number(saves_result(mul(mul_number(x), add_number(mul(mul_number(x), x))))))


def bloom_gelu(x: Tensor) -> Tensor:
    """models/bloom `GeLUFunction`: an autograd.Function that saves its input once its result is there."""
    m = x.machine
    node = record(m, _bloom_gelu_backward, (x,))
    with m.no_grad():
        result = mul(mul_number(x), add_number(_bloom_tanh(x)))
    attach(node, result)
    save_result(node, x)
    return result


def _bloom_tanh(x: Tensor) -> Tensor:
    """tanh(0.79788456 * x * (1 + 0.044715 * x * x))"""
    return saves_result(mul(mul_number(x), add_number(mul(mul_number(x), x))))


def _bloom_gelu_backward(node: Node, grads: GradList) -> Grads:
    """`bloom_gelu_back`, op by op."""
    x, grad = node.unpack(), incoming(grads)
    with node.machine.no_grad():
        tanh_out = _bloom_tanh(x)
        ff = add(
            mul(mul_number(x), mul(add_number(mul(tanh_out, tanh_out)), add_number(mul(mul_number(x), x)))),
            mul_number(add_number(tanh_out)),
        )
        return (mul(ff, grad),)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": saves_input,
    "swish": saves_input,
    "gelu": saves_input,
    "gelu_pytorch_tanh": saves_input,
    "gelu_python_tanh": gelu_new,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "relu": saves_result,
    "sigmoid": saves_result,
    "tanh": saves_result,
}
