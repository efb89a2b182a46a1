"""What the user of a mixture of experts should know: what is not quantised, what PEFT does to experts."""

from __future__ import annotations

from memplan.architectures.peft_targets import converts_experts, parameter_rank
from memplan.dtypes import DType
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig
from memplan.units import human

_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def moe_warnings(spec: ModelSpec, config: TrainConfig) -> list[str]:
    """One sentence each; none for a model whose layers are all dense."""
    if not spec.is_moe:
        return []
    return [*_unquantised(spec, config), *_adapters(spec, config), *_router_loss(spec, config)]


def expert_elements(spec: ModelSpec) -> int:
    """Elements of the expert weights of one layer: gate, up and down projections."""
    return 3 * spec.num_experts * spec.hidden_size * spec.moe_intermediate_size


def _unquantised(spec: ModelSpec, config: TrainConfig) -> list[str]:
    if config.method != "qlora":
        return []
    elements = spec.num_moe_layers * expert_elements(spec)
    plain = human(elements * DType[config.weight_dtype].itemsize)
    text = f"bitsandbytes quantises linear layers only: the experts stay in {config.weight_dtype} ({plain})"
    if config.kbit_prep and config.weight_dtype != "fp32":
        cast = human(elements * DType.fp32.itemsize)
        text += f", and prepare_model_for_kbit_training casts them to fp32 ({cast})"
    return [text]


def _adapters(spec: ModelSpec, config: TrainConfig) -> list[str]:
    if not config.trains_adapters:
        return []
    targets = config.target_modules
    if not converts_experts(spec.model_type):
        if targets != "all-linear":
            return []
        if spec.model_type in _FAILING_ROUTERS:
            return [
                f"PEFT's `all-linear` adapts the router of `{spec.model_type}`, which then fails when it is called: "
                f"estimated without, as `target_modules={_ALL_BUT_ROUTER}` runs; the experts stay frozen"
            ]
        if spec.model_type in _LINEAR_ROUTERS:
            return [
                f"PEFT adapts the router of `{spec.model_type}`, a linear layer, and not its experts: they stay frozen"
            ]
        return [f"PEFT adapts neither the experts nor the router of `{spec.model_type}`: they stay frozen"]
    assert config.rank is not None
    warnings = []
    ranks = [parameter_rank(spec.model_type, targets, name, config.rank) for name in _EXPERTS]
    if any(ranks):
        fp32 = config.method == "qlora" and config.kbit_prep
        itemsize = DType.fp32.itemsize if fp32 else DType[config.weight_dtype].itemsize
        share = (2 if ranks[0] else 0) + (1 if ranks[1] else 0)
        layer = expert_elements(spec) * share // 3 * itemsize
        if config.gradient_checkpointing:
            kept = "of one layer at a time with gradient checkpointing"
        else:
            kept = f"kept for backward in all {spec.num_moe_layers} layers ({human(spec.num_moe_layers * layer)})"
        warnings.append(
            f"PEFT adapts experts by a copy of their weights with the adapter added: {human(layer)} a layer, {kept}; "
            "naming only attention projections in `target_modules` avoids it"
        )
        dense = spec.num_moe_layers < spec.num_hidden_layers or spec.shared_expert_intermediate_size > 0
        if dense and targets == "all-linear":
            warnings.append(
                "PEFT takes `gate_proj`, `up_proj` and `down_proj` for the experts' projections: "
                "dense layers and shared experts get no adapter"
            )
    return warnings


def has_router_loss(spec: ModelSpec, config: TrainConfig) -> bool:
    """Whether a load-balancing loss is added: asked for in the config, or by SFTTrainer wherever the config class knows
    a `router_aux_loss_coef` (TRL 1.16 trainer/sft_trainer.py `aux_loss_enabled`; no family's default is 0)."""
    return spec.output_router_logits or (config.stack == "trl" and spec.model_type in _HAVE_ROUTER_LOSS)


_ALL_BUT_ROUTER = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
_FAILING_ROUTERS = frozenset({"llama4_text"})
_LINEAR_ROUTERS = frozenset({"gemma4_text"})
_HAVE_ROUTER_LOSS = frozenset({"gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"})


def _router_loss(spec: ModelSpec, config: TrainConfig) -> list[str]:
    if not has_router_loss(spec, config):
        return []
    itemsize = 4 if config.autocast else DType[config.weight_dtype].itemsize
    size = spec.num_moe_layers * config.tokens_per_micro_batch * spec.num_experts * itemsize
    return [f"`output_router_logits` adds a loss that keeps the routing of every layer until backward ({human(size)})"]
