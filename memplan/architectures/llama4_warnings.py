"""What the user of Llama 4 should know beside what all mixtures of experts say: what runs every expert on every token,
what autocast makes of frozen experts, and what fails in the libraries as they are."""

from __future__ import annotations

from memplan.architectures.moe_warnings import expert_elements
from memplan.dtypes import DType
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig
from memplan.units import human


def llama4_warnings(spec: ModelSpec, config: TrainConfig) -> list[str]:
    """One sentence each."""
    experts = [*_repeated(spec, config), *_casts(spec, config)] if spec.is_moe else []
    return [*experts, *_backbone(spec, config)]


def _repeated(spec: ModelSpec, config: TrainConfig) -> list[str]:
    """models/llama4/modeling_llama4.py `Llama4TextMoe.forward`: `hidden_states.repeat(num_experts, 1)`."""
    itemsize = DType.bf16.itemsize if config.autocast else DType[config.weight_dtype].itemsize
    hidden, width = spec.hidden_size, spec.moe_intermediate_size
    kept = hidden + 3 * width  # repeated; gate, up and the activation
    if config.method == "full":
        kept += hidden + width  # times the scores; the product of activation and up
    layer = spec.num_experts * config.tokens_per_micro_batch * kept * itemsize
    return [
        f"transformers runs each of the {spec.num_experts} experts on every token, whatever the router chooses: what "
        f"they read and make takes {human(layer)} a layer, {_kept(spec, config, layer)}"
    ]


def _casts(spec: ModelSpec, config: TrainConfig) -> list[str]:
    """torch 2.11 aten/src/ATen/autocast_mode.cpp `cached_cast` caches the casts of trained leaves alone."""
    frozen_fp32 = config.weight_dtype == "fp32" or (config.method == "qlora" and config.kbit_prep)
    if config.method == "full" or not (config.autocast and frozen_fp32):
        return []
    layer = expert_elements(spec) * DType.bf16.itemsize
    return [
        f"autocast casts the frozen fp32 experts to bf16 in every forward ({human(layer)} a layer), "
        f"{_kept(spec, config, layer)}"
    ]


def _kept(spec: ModelSpec, config: TrainConfig, layer_bytes: int) -> str:
    if config.gradient_checkpointing:
        return "for one layer at a time with gradient checkpointing"
    return f"kept for backward in every layer with experts ({human(spec.num_moe_layers * layer_bytes)})"


def _backbone(spec: ModelSpec, config: TrainConfig) -> list[str]:
    """TRL 1.16 trainer/utils.py `add_fused_lm_head` calls `self.base_model`; transformers 5.17 `Llama4ForCausalLM` says
    `base_model_prefix = "language_model"`, and so is its own."""
    if config.stack != "trl" and config.loss != "chunked":
        return []
    return [
        "TRL 1.16's loss fails on `Llama4ForCausalLM`, in which it finds no backbone: estimated as if it did; with "
        "`stack=trainer` the run is as transformers runs it"
    ]
