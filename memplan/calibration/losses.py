"""The loss of the plain loop: the model's own, TRL's in chunks, or Liger's fused with the output layer."""

from __future__ import annotations

from typing import Any

import torch

from memplan.errors import MemplanError
from memplan.train_config import TrainConfig

LIGER_LOSS_ONLY = {
    "fused_linear_cross_entropy": True, "cross_entropy": False, "rope": False, "rms_norm": False,
    "layer_norm": False, "swiglu": False, "geglu": False,
}  # fmt: skip
"""Liger's loss and none of its other kernels, whichever of them the family has."""


def patch_loss(model: Any, config: TrainConfig) -> None:
    """Give the base model (before adapters) the loss that `config` asks for.

    Raises:
        MemplanError: the library that has this loss is not installed.
    """
    if config.loss == "chunked":
        try:
            from trl.trainer.utils import add_fused_lm_head
        except ImportError as error:
            raise MemplanError("the chunked loss is TRL's", hints=["install trl"]) from error
        add_fused_lm_head(model)
    elif config.loss == "liger":
        try:
            from liger_kernel.transformers import (  # type: ignore[import-not-found,unused-ignore]
                _apply_liger_kernel_to_instance,
            )
        except ImportError as error:
            raise MemplanError("the liger loss is liger-kernel's", hints=["install liger-kernel"]) from error
        _apply_liger_kernel_to_instance(model=model, **LIGER_LOSS_ONLY)


def compute_loss(model: Any, batch: dict[str, torch.Tensor], config: TrainConfig) -> torch.Tensor:
    """The mean loss of one batch; the model's outputs are let go on return."""
    chunks = {"fused_lm_head": True} if config.loss == "chunked" else {}
    loss: torch.Tensor = model(**batch, **chunks).loss
    return loss
