"""Activations of the MLP by their Hugging Face name (transformers 5.17 activations.py `ACT2FN`).

What each saves decides the memory of the MLP: one kernel saves its input or its result, one written out in
elementwise ops saves several tensors.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.ops.pointwise import add, add_number, mul, mul_number, pow_number, saves_input, saves_result
from memplan.ops.tensor import Tensor


def gelu_new(x: Tensor) -> Tensor:
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))), op by op (`NewGELUActivation`)."""
    # nested as there, so that each intermediate dies with the expression that takes it
    return mul(mul_number(x), add_number(saves_result(mul_number(add(x, mul_number(pow_number(x)))))))


def gelu_fast(x: Tensor) -> Tensor:
    """0.5 * x * (1 + tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))) (`FastGELUActivation`)."""
    return mul(mul_number(x), add_number(saves_result(mul(mul_number(x), add_number(mul(mul_number(x), x))))))


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
