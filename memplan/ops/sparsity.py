"""gemma3n's sparse gates: what lies below a quantile of a normal distribution fitted to each token's is cut to zero.

models/gemma3n/modeling_gemma3n.py `Gemma3nTextMLP._gaussian_topk`, for gates x [B, S, I]:

    cutoff = mean(x) + std(x) * multiplier      std saves x and, one value a token, its result
    relu(x - cutoff)                            saves its result
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, record, result_of, save_result
from memplan.ops.pointwise import GradList, add, incoming, mean_last, mul, saves_result, sub, to
from memplan.ops.tensor import Machine, Tensor


def gaussian_topk(inputs: Tensor) -> Tensor:
    """`_gaussian_topk`: as large as its input."""
    m = inputs.machine
    target_sparsity = m.empty((), DType.fp32)
    std_multiplier = _quantile(m)
    std_multiplier = to(std_multiplier, inputs.dtype)
    inputs_mean = mean_last(inputs)
    inputs_std = std_last(inputs)
    cutoff = add(inputs_mean, mul(inputs_std, std_multiplier))
    result = saves_result(sub(inputs, cutoff))
    del target_sparsity  # a local of the module's method, as the others
    return result


def _quantile(m: Machine) -> Tensor:
    """torch.distributions.Normal.icdf of a scalar: loc + scale * erfinv(2 * value - 1) * sqrt(2), a scalar each."""
    value = m.empty((), DType.fp32)
    for _ in range(5):
        value = m.empty((), DType.fp32)
    return value


def std_last(x: Tensor) -> Tensor:
    """x.std(-1, keepdim=True): saves x and its result."""
    m = x.machine
    node = record(m, _std_backward, (x,), (x,))
    result = result_of(node, m, (*x.shape[:-1], 1), x.dtype)
    save_result(node, result)
    return result


def _std_backward(node: Node, grads: GradList) -> Grads:
    """FunctionsManual.cpp `std_backward`, `var_backward`: 2 / n * grad_var * (x - mean), grad_var = grad / (2 std)."""
    grad, m = incoming(grads), node.machine
    x, std = node.unpack(0), node.unpack(1)
    doubled = m.empty(std.shape, std.dtype)
    grad_var = m.empty(std.shape, std.dtype)
    del doubled
    is_zero = m.empty(std.shape, DType.bool8)
    del is_zero
    scaled = m.empty(std.shape, std.dtype)
    mean = m.empty(std.shape, std.dtype)
    centred = m.empty(x.shape, x.dtype)
    del mean
    out = m.empty(x.shape, grad.dtype)
    del scaled, centred, grad_var, x, std
    return (out,)
