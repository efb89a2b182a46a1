"""TRL's chunked loss as on CUDA (trl/trainer/utils.py `add_fused_lm_head`, trl/kernels/chunked_logprob.py).

The real functions run; what they do only on a GPU is switched on: Triton kernels (which allocate nothing), the
selection of labelled positions, and `addmm` from half precision into fp32 in place.

`unittest.mock` objects would keep the tensors they were called with, so the stand-ins are plain functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for


class _Kernel:
    """Stands for a Triton kernel: launched on a grid, it writes into what it is given."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


def _yes(_: Any) -> bool:
    return True


def _in_place_addmm(acc: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`addmm(acc, a, b, out_dtype=torch.float32, out=acc)` allocates nothing."""


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def add_fused_head(model: torch.nn.Module, stack: str) -> None:
    """SFTTrainer asks for what its metrics need; a plain loop takes the default, the loss alone."""
    from trl.trainer.utils import add_fused_lm_head

    get_base_model = getattr(model, "get_base_model", None)
    base = get_base_model() if get_base_model else model
    add_fused_lm_head(base, **({"outputs": OUTPUTS} if stack == "trl" else {}))


@contextmanager
def on_gpu() -> Iterator[None]:
    import trl.kernels.chunked_logprob as kernels
    import trl.trainer.utils as utils

    with (
        mock.patch.object(utils, "_use_triton", _yes),
        mock.patch.object(kernels, "_use_triton", _yes),
        mock.patch.object(kernels, "_forward_kernel", _Kernel()),
        mock.patch.object(kernels, "_backward_kernel", _Kernel()),
        mock.patch.object(kernels, "triton", SimpleNamespace(cdiv=_cdiv), create=True),
        mock.patch.object(kernels, "_addmm_fp32", _in_place_addmm),
    ):
        yield
