"""Optimizers by Hugging Face `optim` string, as transformers/trainer_optimizer.py makes them, on fake CPU tensors.

torch.optim leaves `foreach=None` on CUDA, which means foreach there and a loop on the CPU: so it is said here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from tests.oracle.tracker import Tracker

PAGED_NUMEL = 1e5  # bitsandbytes/optim/optimizer.py `get_state_buffer`: larger states live in managed memory


def make(name: str, model: nn.Module, stack: str) -> torch.optim.Optimizer:
    """The optimizer called `name`; `adamw_torch_forloop` and `sgd_momentum` are additions of this module."""
    optimizer = _make(name, parameter_groups(model, stack))
    if stack != "torch" and "8bit" in name:
        # Trainer.create_optimizer: embeddings keep their states in fp32.
        from bitsandbytes.optim import GlobalOptimManager

        for module in model.modules():
            if isinstance(module, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def _make(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if name in TORCH:
        return TORCH[name](groups)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)
    from bitsandbytes import optim

    families = {"adam": optim.AdamW, "lion": optim.Lion, "rmsprop": optim.RMSprop}
    family = next(cls for key, cls in families.items() if key in name)
    kwargs: dict[str, Any] = {"optim_bits": 8 if "8bit" in name else 32}
    if family is not optim.RMSprop:
        kwargs["is_paged"] = "paged" in name
    return family(groups, lr=1e-3, **kwargs)


TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw_torch_fused": functools.partial(torch.optim.AdamW, fused=True),
    "adamw_torch_forloop": functools.partial(torch.optim.AdamW, foreach=False),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3, foreach=True),
    "sgd_momentum": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, foreach=True),
    "adagrad": functools.partial(torch.optim.Adagrad, foreach=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, foreach=True),
}


def parameter_groups(model: nn.Module, stack: str) -> list[dict[str, Any]]:
    """One group in a plain loop; `Trainer.create_optimizer` makes one with and one without weight decay."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if stack == "torch":
        return [{"params": list(trainable.values())}]
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    groups = ([p for n, p in trainable.items() if (n in decaying) == decays] for decays in (True, False))
    return [{"params": group} for group in groups if group]


@contextmanager
def bitsandbytes_on_gpu(tracker: Tracker) -> Iterator[None]:
    """The code tables are made on the host; a large paged state is not in the allocator's memory. What Trainer told
    the manager, which is one for the process, is forgotten."""
    import bitsandbytes.functional
    from bitsandbytes.optim import GlobalOptimManager
    from bitsandbytes.optim.optimizer import Optimizer8bit

    def create_dynamic_map(**_: Any) -> torch.Tensor:
        with tracker.on_host():
            return torch.empty(256)

    def get_state_buffer(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with tracker.on_host() if self.is_paged and p.numel() >= PAGED_NUMEL else ExitStack():
            return torch.zeros_like(p, dtype=dtype)

    with (
        mock.patch.object(bitsandbytes.functional, "create_dynamic_map", create_dynamic_map),
        mock.patch.object(Optimizer8bit, "get_state_buffer", get_state_buffer),
    ):
        try:
            yield
        finally:
            GlobalOptimManager.get_instance().initialize()
