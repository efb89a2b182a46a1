"""Optimizers by their Hugging Face `optim` string, as transformers' Trainer makes them, for the plain loop.

Two names are not Hugging Face's: `adamw_torch_forloop` (foreach=False) and `sgd_momentum` (momentum 0.9).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from memplan.errors import UnknownNameError

_LR = 1e-5

_TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_torch": ("AdamW", {}),
    "adamw_torch_fused": ("AdamW", {"fused": True}),
    "adamw_torch_forloop": ("AdamW", {"foreach": False}),
    "sgd": ("SGD", {}),
    "sgd_momentum": ("SGD", {"momentum": 0.9}),
    "rmsprop": ("RMSprop", {}),
    "adagrad": ("Adagrad", {}),
}
_BNB: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_bnb_8bit": ("AdamW", {"optim_bits": 8}),
    "adamw_8bit": ("AdamW", {"optim_bits": 8}),
    "paged_adamw_8bit": ("AdamW", {"optim_bits": 8, "is_paged": True}),
    "paged_adamw_32bit": ("AdamW", {"optim_bits": 32, "is_paged": True}),
    "lion_8bit": ("Lion", {"optim_bits": 8}),
    "lion_32bit": ("Lion", {"optim_bits": 32}),
    "paged_lion_8bit": ("Lion", {"optim_bits": 8, "is_paged": True}),
    "paged_lion_32bit": ("Lion", {"optim_bits": 32, "is_paged": True}),
    "ademamix": ("AdEMAMix", {"optim_bits": 32}),
    "ademamix_8bit": ("AdEMAMix", {"optim_bits": 8}),
}
NOT_HUGGING_FACE = ("adamw_torch_forloop", "sgd_momentum")
NAMES = tuple(sorted((*_TORCH, *_BNB, "adafactor")))


def make_optimizer(name: str, parameters: Iterable[Any]) -> Any:
    """The optimizer called `name` over `parameters`, in one group.

    Raises:
        UnknownNameError: no optimizer of that name is made here.
    """
    trained = list(parameters)
    if name in _TORCH:
        cls, options = torch_optimizer(name)
        return cls(trained, lr=_LR, **options)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(trained, lr=_LR, scale_parameter=False, relative_step=False)
    if name in _BNB:
        import bitsandbytes as bnb

        name_of_class, options = _BNB[name]
        return getattr(bnb.optim, name_of_class)(trained, lr=_LR, **options)
    raise UnknownNameError("optimizer", name, NAMES)


def torch_optimizer(name: str) -> tuple[Any, dict[str, Any]]:
    """Class and options of one of torch's own optimizers."""
    name_of_class, options = _TORCH[name]
    return getattr(torch.optim, name_of_class), options


def state_bytes(optimizer: Any, device: torch.device) -> int:
    """Bytes of the optimizer's state on `device`, each storage once."""
    storages = {}
    stack = list(optimizer.state.values())
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, torch.Tensor) and item.device.type == device.type:
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())
