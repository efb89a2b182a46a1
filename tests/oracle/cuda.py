"""What CUDA does where the CPU build of PyTorch does otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.oracle.tracker import Tracker

aten = torch.ops.aten

KERNELS: dict[Any, Callable[..., Any]] = {}
SCRATCH: dict[Any, Callable[..., list[int]]] = {}


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


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)
    return out[0]


@contextmanager
def emulated(tracker: Tracker) -> Iterator[None]:
    real_tensor = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is None:
            with tracker.on_host():
                return real_tensor(data, *args, **kwargs)
        return real_tensor(data, *args, **kwargs)

    with (
        mock.patch("torch.tensor", tensor),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", sdpa),
        mock.patch("transformers.utils.import_utils.is_fake_tensor", lambda _: False),
    ):
        yield


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_torch": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw_torch_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw_torch_forloop": lambda p: torch.optim.AdamW(p, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
}
