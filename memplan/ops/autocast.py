"""torch.autocast to bf16: which ops cast what, and the cache of cast weights.

Source: torch 2.11 aten/src/ATen/autocast_mode.cpp `cached_cast`, autocast_mode.h (CUDA op lists).
A leaf that requires a gradient and is fp32 is cast once and the copy kept until the outermost autocast
block is left; anything else is cast anew each time. Matrix products and attention run in bf16; layer_norm,
pow, rsqrt, softmax, log_softmax and nll_loss in fp32.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.pointwise import to
from memplan.ops.tensor import Parameter, Tensor

LOW = DType.bf16


def low(x: Tensor) -> Tensor:
    """`x` as an op of the bf16 list gets it: cast under autocast if it is a float of another dtype."""
    m = x.machine
    if not m.autocast or x.dtype is LOW or not x.dtype.is_floating:
        return x
    cacheable = (isinstance(x, Parameter) or x.is_leaf) and x.requires_grad and x.dtype is DType.fp32
    if not cacheable:
        return to(x, LOW)
    held = m.cast_cache.get(id(x))
    if held is None:
        held = m.cast_cache[id(x)] = (x, to(x, LOW))
    return held[1]


def high(x: Tensor) -> Tensor:
    """`x` as an op of the fp32 list gets it."""
    if not x.machine.autocast or not x.dtype.is_half:
        return x
    return to(x, DType.fp32)
