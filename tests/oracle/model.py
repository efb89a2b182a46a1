"""The real transformers model (PEFT, bitsandbytes 4-bit linears), built on meta, then made of fake CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.oracle.bnb import quantize, state_tensors
from tests.oracle.trainers import prepare_for_sft

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build(
    hf_config: dict[str, Any],
    *,
    method: str,
    weight_dtype: str,
    attention: str,
    rank: int,
    target_modules: str | tuple[str, ...],
    lora_dropout: float,
    use_dora: bool,
    modules_to_save: tuple[str, ...],
    double_quant: bool,
    kbit_prep: bool,
    adapter_dtype: str,
    gradient_checkpointing: bool,
    reentrant: bool,
    stack: str = "torch",
) -> tuple[nn.Module, int]:
    """The training-ready model on meta, as a user of these libraries sets it up; the base model's parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**hf_config)
    config.use_cache = False
    if stack == "trl":
        prepare_for_sft(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=DTYPES[weight_dtype],
            # Left to transformers, it is sdpa where the family supports it and eager where not.
            attn_implementation=None if attention == "sdpa" else attention,
        )
    num_params = sum(parameter.numel() for parameter in model.parameters())
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if method == "qlora":
        half = DTYPES[weight_dtype] if weight_dtype != "fp32" else torch.bfloat16
        quantize(model, double_quant=double_quant, compute_dtype=half)
    if method == "qlora" and kbit_prep:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=gradient_checkpointing, **checkpointing
        )
    elif gradient_checkpointing:
        model.gradient_checkpointing_enable(**checkpointing)
    if gradient_checkpointing and method != "full":
        model.enable_input_require_grads()
    if method != "full":
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=lora_dropout,
            target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
            use_dora=use_dora,
            modules_to_save=list(modules_to_save) or None,
            task_type="CAUSAL_LM",
            bias="none",
        )
        with mock.patch("peft.tuners.lora.dora.deepcopy", _itself):  # 4-bit weights on meta cannot be copied
            model = get_peft_model(model, adapters)
        for name, parameter in model.named_parameters():
            # SFTTrainer leaves DoRA's magnitudes of a quantised model as they are.
            stays = "lora_magnitude_vector" in name and stack == "trl" and method == "qlora"
            if parameter.requires_grad and adapter_dtype != "fp32" and not stays:
                parameter.data = parameter.data.to(DTYPES[adapter_dtype])
    model.train()
    return model, num_params


def _itself(value: Any) -> Any:
    return value


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything the loaded model keeps on the GPU."""
    for name, parameter in model.named_parameters():
        yield name, parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for number, (holder, attribute) in enumerate(state_tensors(state)):
                yield f"{name}.{attribute}{number}", getattr(holder, attribute)
    yield from model.named_buffers()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield name, value


_FAKE_4BIT = type("Params4bit", (FakeTensor,), {})


def fakeify(model: nn.Module) -> None:
    """Replace each meta parameter and buffer by a fake CPU one (call it under FakeTensorMode), ties kept."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                for holder, name in state_tensors(state):
                    setattr(holder, name, fake(getattr(holder, name)))
                new.__class__ = _FAKE_4BIT  # PEFT's DoRA asks for the class by name
            for name, value in vars(tensor).items():
                setattr(new, name, value)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None and tensor.device.type == "meta":
                    slots[name] = fake(tensor)
        # Tensors that are neither parameter nor buffer (none are expected, but a library may keep one).
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                setattr(module, name, fake(value))
