"""A real transformers model with random weights, built on the GPU piece by piece, with nothing downloaded.

The model is made on the meta device and each parameter is then given storage on its own; a linear layer that
is to be quantised is quantised before the next one gets storage. A 70B model in 4 bit never exists in 16 bit.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from memplan.calibration.record import Case
from memplan.train_config import TrainConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INIT_STD = 0.02


def build_model(case: Case, config: TrainConfig, device: torch.device) -> Any:
    """The base model on `device`: weights in `config.weight_dtype`, linear layers quantised under `qlora`.

    Equal to what `from_pretrained` leaves in memory: same parameters, same buffers, same dtypes, ties kept.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.for_model(**case.hf_config)
    dtype = DTYPES[config.weight_dtype]
    # Unsaid, transformers picks sdpa where the family has it, else eager (gptj, bloom, mpt, gpt_oss).
    attention = config.attention if "attention" in config.model_fields_set else None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=attention)
    quantizer = _replace_linears(model, config) if config.method == "qlora" else None
    _keep_some_in_fp32(model, dtype)
    if case.warm_allocator and device.type == "cuda":
        _warm_allocator(model, device, quantizer)
    materialise(model, device, dtype)
    model.config.use_cache = case.use_cache
    model.train()
    return model


def materialise(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter and buffer of a meta model storage on `device` and its usual initial value."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    modules = dict(model.named_modules())
    for name, parameter in list(model.named_parameters()):
        if name in tied or parameter.device.type != "meta":
            continue
        owner, leaf = _split(modules, name)
        if leaf == "weight" and hasattr(owner, "source_cls"):
            owner.weight = quantised_weight(owner, parameter, device, dtype)
        elif hasattr(owner, "source_cls"):
            # bitsandbytes makes layers with a frozen fp32 bias; loading puts the checkpoint's in its place.
            setattr(owner, leaf, nn.Parameter(torch.empty_like(parameter, dtype=dtype, device=device)))
        else:
            empty = torch.empty_like(parameter, device=device)
            setattr(owner, leaf, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        if buffer.device.type == "meta":
            owner, leaf = _split(modules, name)
            # Assignment keeps the buffer's place and whether it is persistent.
            setattr(owner, leaf, torch.empty_like(buffer, device=device))
    model.tie_weights()
    with torch.no_grad():
        for module in modules.values():
            if hasattr(module, "source_cls"):
                # Quantised already: the library's init would overwrite the packed bytes.
                module._is_hf_initialized = module.weight._is_hf_initialized = True
                if module.bias is not None:
                    module.bias.zero_()
        # The library's own init: norms, rotary tables, expert stacks and sinks are right for each family.
        model.initialize_weights()
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    assert not left, f"still on the meta device: {left[:5]}"


def quantised_weight(module: Any, old: Any, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """One bitsandbytes weight: random in `dtype` on `device`, quantised at once, as loading does."""
    import bitsandbytes as bnb

    value = torch.empty(module.out_features, module.in_features, dtype=dtype, device=device)
    value.normal_(std=_INIT_STD)
    said = dict(old.__dict__)
    if isinstance(old, bnb.nn.Params4bit):
        new: nn.Parameter = bnb.nn.Params4bit(value, requires_grad=False, **said).to(device)
        return new
    said.pop("SCB", None)
    new = bnb.nn.Int8Params(value.to("cpu"), requires_grad=False, **said).to(device)
    return new  # noqa: RET504 -- the annotation above types it


def _replace_linears(model: Any, config: TrainConfig) -> Any:
    """Put bitsandbytes layers where transformers would, and mark the model as quantised."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    if config.quant_type == "int8":
        wanted = BitsAndBytesConfig(load_in_8bit=True)
    else:
        wanted = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quant_type,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=torch.float16 if config.weight_dtype == "fp16" else torch.bfloat16,
        )
    quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=False)
    quantizer.preprocess_model(model=model, dtype=DTYPES[config.weight_dtype], device_map=None)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer  # Trainer asks it whether the model may be trained
    return quantizer


def _keep_some_in_fp32(model: Any, dtype: torch.dtype) -> None:
    """Parameters that transformers keeps in fp32 whatever dtype is asked for (its `dtype_plan`)."""
    plan = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        plan |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not plan:
        return
    wanted = re.compile("|".join(rf"((^|\.){name}($|\.))" for name in sorted(plan)))
    modules = dict(model.named_modules())
    for name, parameter in list(model.named_parameters()):
        if wanted.search(name) and parameter.dtype == dtype:
            owner, leaf = _split(modules, name)
            setattr(owner, leaf, nn.Parameter(parameter.float(), requires_grad=parameter.requires_grad))
    for name, buffer in list(model.named_buffers()):
        if wanted.search(name) and buffer.dtype == dtype:
            owner, leaf = _split(modules, name)
            setattr(owner, leaf, buffer.float())


def _warm_allocator(model: Any, device: torch.device, quantizer: Any) -> None:
    from transformers.modeling_utils import caching_allocator_warmup

    index = torch.device(device.type, device.index or 0)
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    caching_allocator_warmup(model, dict.fromkeys(names, index), quantizer)


def _split(modules: dict[str, Any], name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return modules[path], leaf
