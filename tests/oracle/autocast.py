"""CUDA's autocast lists on CPU tensors (aten/src/ATen/autocast_mode.h), for the ops that the CPU's leave alone.

The CPU and CUDA share the lower-precision list as far as these models go (linear, matmul, mm, bmm, addmm,
baddbmm) and the cache of cast weights. They differ in the ops that CUDA runs in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_map

# AT_FORALL_FP32: inputs are cast to fp32.
FP32 = [
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
    *("sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm"),
    *("native_layer_norm", "group_norm", "logsumexp", "nll_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    *("kl_div", "binary_cross_entropy_with_logits", "dist"),
]
# AT_FORALL_FP32_SET_OPT_DTYPE: `dtype` becomes fp32 where none is given.
FP32_RESULT = [
    *("softmax.int", "log_softmax.int", "cumsum", "cumprod", "sum", "sum.dim_IntList", "linalg_vector_norm"),
    "prod.dim_int",
]


@contextmanager
def cuda_lists() -> Iterator[None]:
    """Make `torch.autocast("cpu")` treat these ops as `torch.autocast("cuda")` would, inside the context."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in FP32:
            library.impl(name, _cast_inputs(_overload(name)), "AutocastCPU")
        for name in FP32_RESULT:
            library.impl(name, _set_dtype(_overload(name)), "AutocastCPU")
        yield
    finally:
        library._destroy()


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _is_eligible(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _to_fp32(value: Any) -> Any:
    return value.to(torch.float32) if _is_eligible(value) else value


def _cast_inputs(op: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with without_autocast():
            return op(*tree_map(_to_fp32, args), **tree_map(_to_fp32, kwargs))

    return kernel


def _set_dtype(op: Any) -> Callable[..., Any]:
    takes_position = [argument.name for argument in op._schema.arguments].index("dtype")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with without_autocast():
            given = args[takes_position] if len(args) > takes_position else kwargs.get("dtype")
            if _is_eligible(args[0]) and given is None:
                args, kwargs = args[:takes_position], {**kwargs, "dtype": torch.float32}
            return op(*args, **kwargs)

    return kernel
