"""What CUDA does where the CPU build of PyTorch does otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401  (defines torch.ops.bitsandbytes)
import torch
from torch import nn

from tests.oracle import sdpa
from tests.oracle.bnb import gemm_4bit
from tests.oracle.tracker import Tracker

aten = torch.ops.aten

KERNELS: dict[Any, Callable[..., Any]] = {}
SCRATCH: dict[Any, Callable[..., list[int]]] = dict(sdpa.SCRATCH)


def scalar_value(tensor: torch.Tensor) -> Any:
    """What `.item()` gives on a fake tensor: a mask is never all ones, positions are one sequence, a count is 1."""
    if tensor.dtype == torch.bool:
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "find_packed_sequence_indices":
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False
    return 1.0 if tensor.dtype.is_floating_point else 1


def _foreach_norm_scratch(out: list[torch.Tensor], tensors: list[torch.Tensor], *_: Any) -> list[int]:
    """One fp32 partial sum per chunk (aten/src/ATen/native/cuda/ForeachReduceOp.cu: `output_per_tensor`)."""
    chunk = 65536  # kChunkSize, aten/src/ATen/native/cuda/MultiTensorApply.cuh
    return [4 * len(tensors) * max(-(-tensor.numel() // chunk) for tensor in tensors)]


SCRATCH[aten._foreach_norm.Scalar] = _foreach_norm_scratch
KERNELS[torch.ops.bitsandbytes.gemm_4bit.default] = gemm_4bit


@contextmanager
def emulated(tracker: Tracker, sdpa_first: str) -> Iterator[None]:
    """Everything above as long as the context lasts."""
    real_tensor = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") in (None, "cpu"):  # a literal: GPU code passes a tensor's device
            with tracker.on_host():
                return real_tensor(data, *args, **kwargs)
        return real_tensor(data, *args, **kwargs)

    real_autocast = torch.is_autocast_enabled

    def is_autocast_enabled(device_type: str = "cpu") -> bool:
        # PEFT asks without naming a device, which means CUDA.
        return real_autocast(device_type)

    with (
        mock.patch("torch.tensor", tensor),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", sdpa.make(sdpa_first)),
        mock.patch("torch.is_autocast_enabled", is_autocast_enabled),
        mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda _: False),
    ):
        yield


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_torch": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw_torch_forloop": lambda p: torch.optim.AdamW(p, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
}
