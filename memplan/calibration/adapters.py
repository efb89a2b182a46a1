"""What a script does between loading a model and its first step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memplan.calibration.build import DTYPES
from memplan.train_config import TrainConfig


def prepare(model: Any, config: TrainConfig) -> Any:
    """The model ready to train, in the order of PEFT's guides: k-bit preparation, checkpointing, adapters."""
    if config.method == "qlora" and config.kbit_prep:
        model = kbit_prepare(model, config)
    if config.gradient_checkpointing:
        enable_checkpointing(model, config)
    return add_adapters(model, config) if config.trains_adapters else model


def kbit_prepare(model: Any, config: TrainConfig) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": config.reentrant},
    )


def enable_checkpointing(model: Any, config: TrainConfig) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": config.reentrant})
    if config.trains_adapters:
        # A frozen embedding's output asks for no gradient; a reentrant checkpoint needs an input that does.
        model.enable_input_require_grads()


def add_adapters(model: Any, config: TrainConfig) -> Any:
    from peft import get_peft_model

    peft_model = get_peft_model(model, lora_config(config))
    if config.adapter_dtype != "fp32":
        cast_adapters(peft_model, DTYPES[config.adapter_dtype])
    return peft_model


def lora_config(config: TrainConfig) -> Any:
    """PEFT's LoraConfig of `config`; what it does not say is PEFT's default."""
    from peft import LoraConfig

    targets = config.target_modules
    return LoraConfig(
        r=config.rank or 16,
        lora_alpha=2 * (config.rank or 16),
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(config.modules_to_save) or None,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )


def cast_adapters(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
