"""Each Hugging Face family: how its config spells a field, and what its modeling code fixes with no key.

Read from transformers 5.17, `models/<model_type>/configuration_*.py` and `modeling_*.py`. A test builds every
family at toy size and compares the biases and norms told here with the modules that are really there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# How a family decides which layers slide.
# "every": all of them as soon as `sliding_window` is set.
# "upper": those from `max_window_layers` on, if `use_sliding_window`.
# an integer n: all but each n-th. `layer_types`, where given, wins over the last two.
# "chunked" is no sliding: layers that rotate attend in chunks.
# "linear" is no sliding: layers with linear attention, all but each fourth (`full_attention_interval`) without
# `layer_types`.
Sliding = Literal["none", "every", "upper", "no_rope", "chunked", "qwen2_moe", "linear"] | int


@dataclass(frozen=True)
class Family:
    """One `model_type`: `keys` maps a ModelSpec field to the config key that holds it where the two differ,
    `fixed` gives fields that no key decides."""

    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    sliding: Sliding = "none"
    derives_head_dim: bool = False
    """`head_dim` is always hidden_size / num_attention_heads; a `head_dim` key has no effect."""
    rotary_factor: float | None = None
    """Part of each head that is rotated when the config does not say; None where the model rotates all."""
    rotary_factor_keys: tuple[str, ...] = ("partial_rotary_factor",)


_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
    "hidden_act": "activation_function",
    "attention_dropout": "attn_pdrop",
    "hidden_dropout": "resid_pdrop",
    "embedding_dropout": "embd_pdrop",
}
# One `attention_bias` for q, k, v and the output projection.
_ALL_FOUR = {"attention_out_bias": "attention_bias"}
_ROUTED_KEYS = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
_DEEPSEEK_KEYS = _ALL_FOUR | _ROUTED_KEYS
_BIASED = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}

FAMILIES: dict[str, Family] = {
    "llama": Family(keys=_ALL_FOUR),
    "llama4_text": Family(
        keys=_ALL_FOUR
        | {
            "intermediate_size": "intermediate_size_mlp",
            "moe_intermediate_size": "intermediate_size",
            "num_experts": "num_local_experts",
            "qk_norm": "use_qk_norm",
        },
        sliding="chunked",
    ),
    "mistral": Family(sliding="every"),
    "ministral3": Family(sliding="every"),
    "seed_oss": Family(keys={"hidden_dropout": "residual_dropout"}),
    "qwen2": Family(fixed={"attention_bias": True}, sliding="upper"),
    "qwen3": Family(keys=_ALL_FOUR, fixed={"qk_norm": True}, sliding="upper"),
    "gemma": Family(keys=_ALL_FOUR),
    "gemma2": Family(keys=_ALL_FOUR | {"hidden_act": "hidden_activation"}, sliding=2),
    "gemma3_text": Family(keys=_ALL_FOUR | {"hidden_act": "hidden_activation"}, fixed={"qk_norm": True}, sliding=6),
    "gemma3n_text": Family(keys=_ALL_FOUR | {"hidden_act": "hidden_activation"}, fixed={"qk_norm": True}, sliding=5),
    "gemma4_text": Family(
        keys=_ALL_FOUR | {"hidden_act": "hidden_activation", "num_experts_per_tok": "top_k_experts"},
        fixed={"qk_norm": True},
        sliding=6,
    ),
    "gemma4_unified_text": Family(
        keys=_ALL_FOUR | {"hidden_act": "hidden_activation"}, fixed={"qk_norm": True}, sliding=6
    ),
    "phi": Family(
        keys={"hidden_dropout": "resid_pdrop", "embedding_dropout": "embd_pdrop", "qk_norm": "qk_layernorm"},
        fixed=_BIASED | {"lm_head_bias": True, "parallel_residual": True},
        rotary_factor=0.5,
    ),
    # `embd_pdrop` is a key of phi3's config that its modeling code never reads.
    "phi3": Family(keys={"hidden_dropout": "resid_pdrop"}, sliding="every", rotary_factor=1.0),
    "gpt2": Family(keys=_GPT2_KEYS, fixed=_BIASED, derives_head_dim=True),
    "gpt_neox": Family(
        keys=_ALL_FOUR | {"embedding_dropout": "hidden_dropout", "parallel_residual": "use_parallel_residual"},
        fixed={"mlp_bias": True},
        derives_head_dim=True,
        rotary_factor=0.25,
        rotary_factor_keys=("rotary_pct",),
    ),
    "gptj": Family(
        keys=_GPT2_KEYS,
        fixed={"mlp_bias": True, "lm_head_bias": True, "parallel_residual": True},
        derives_head_dim=True,
    ),
    "falcon": Family(
        keys={
            "num_key_value_heads": "num_kv_heads",
            "intermediate_size": "ffn_hidden_size",
            "hidden_act": "activation",
            "parallel_residual": "parallel_attn",
            "attention_bias": "bias",
            "attention_out_bias": "bias",
            "mlp_bias": "bias",
        },
        derives_head_dim=True,
    ),
    "opt": Family(
        keys={
            "intermediate_size": "ffn_dim",
            "initializer_range": "init_std",
            "hidden_act": "activation_function",
            "hidden_dropout": "dropout",
            "attention_bias": "enable_bias",
            "attention_out_bias": "enable_bias",
            "mlp_bias": "enable_bias",
            "norm_affine": "layer_norm_elementwise_affine",
        },
        derives_head_dim=True,
    ),
    "bloom": Family(
        keys={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        fixed=_BIASED | {"hidden_act": "gelu", "alibi": True, "max_position_embeddings": None},
        derives_head_dim=True,
    ),
    # `no_bias`, `expansion_ratio`, `resid_pdrop`, `emb_pdrop` and `attn_config.alibi` have no effect.
    "mpt": Family(
        keys={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
        fixed={"hidden_act": "gelu", "alibi": True},
        derives_head_dim=True,
    ),
    "olmo": Family(keys=_ALL_FOUR, fixed={"norm_affine": False}),
    "olmo2": Family(keys=_ALL_FOUR, fixed={"qk_norm": True}),
    "olmo3": Family(keys=_ALL_FOUR, fixed={"qk_norm": True}, sliding=4),
    "smollm3": Family(keys=_ALL_FOUR, sliding="no_rope"),
    "exaone4": Family(fixed={"qk_norm": True}, sliding=4),
    "starcoder2": Family(
        keys={
            "hidden_dropout": "residual_dropout",
            "attention_bias": "use_bias",
            "attention_out_bias": "use_bias",
            "mlp_bias": "use_bias",
        },
        sliding="every",
    ),
    "granite": Family(keys=_ALL_FOUR),
    "stablelm": Family(
        keys={
            "attention_bias": "use_qkv_bias",
            "qk_norm": "qk_layernorm",
            "parallel_residual": "use_parallel_residual",
        },
        derives_head_dim=True,
        rotary_factor=0.25,
        rotary_factor_keys=("partial_rotary_factor", "rope_pct"),
    ),
    "cohere": Family(keys=_ALL_FOUR | {"qk_norm": "use_qk_norm"}, fixed={"parallel_residual": True}),
    "mixtral": Family(
        keys={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        sliding="every",
    ),
    "qwen3_moe": Family(keys=_ALL_FOUR, fixed={"qk_norm": True}, sliding="every"),
    "qwen2_moe": Family(keys={"attention_bias": "qkv_bias"}, sliding="qwen2_moe"),
    "qwen3_5_text": Family(keys=_ALL_FOUR, fixed={"qk_norm": True}, sliding="linear", rotary_factor=0.25),
    "qwen3_next": Family(keys=_ALL_FOUR, fixed={"qk_norm": True}, sliding="linear", rotary_factor=0.25),
    "gpt_oss": Family(
        keys=_ALL_FOUR | {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        fixed={"mlp_bias": True},
        sliding=2,
    ),
    "olmoe": Family(keys=_ALL_FOUR | {"moe_intermediate_size": "intermediate_size"}, fixed={"qk_norm": True}),
    "deepseek_v2": Family(keys=_DEEPSEEK_KEYS),
    "deepseek_v3": Family(keys=_DEEPSEEK_KEYS),
    "glm": Family(rotary_factor=0.5),
    "glm4": Family(rotary_factor=0.5),
    "glm4_moe": Family(keys=_ROUTED_KEYS | {"qk_norm": "use_qk_norm"}, rotary_factor=0.5),
}

# `model_type`s of checkpoints older than their transformers class.
OLD_MODEL_TYPES = {
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "Yi": "llama",
    "phi-msft": "phi",
    "stablelm_epoch": "stablelm",
}
# Wrappers of a text model (beside a vision tower) whose `text_config` may leave its own type out, as their config
# classes fill it in.
TEXT_MODEL_TYPES = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "paligemma": "gemma",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_5": "qwen3_5_text",
    "smolvlm": "llama",
}
# Of these, the ones whose older configs have the text model's keys beside `vision_config`, not nested.
FLAT_TEXT_CONFIGS = ("qwen2_vl", "qwen2_5_vl")
# Of these, the ones whose text model has its own head, so that its own `tie_word_embeddings` counts.
WITH_OWN_HEAD = ("llama4",)
# Text models of multimodal ones whose layers are those of a family: they differ in how the rotary tables, made once a
# step, are put together (three kinds of positions), which is not played.
TEXT_MODELS_OF_FAMILY = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}

_LINEAR_ATTENTION = "most of its layers have linear attention"
_STATE_SPACE = "it has state-space layers"
# Families of transformers 5.17 that are asked for and not modelled: why, and the nearest that is.
NOT_MODELLED: dict[str, tuple[str, str]] = {
    "qwen3_5_moe_text": (_LINEAR_ATTENTION, "qwen3_moe"),
    "kimi_linear": (_LINEAR_ATTENTION, "deepseek_v3"),
    "qwen3_vl_moe_text": ("PEFT converts the names of its experts differently", "qwen3_moe"),
    "glm4_moe_lite": ("its layers are not written down", "glm4_moe"),
    "deepseek_v32": ("its attention chooses tokens by an indexer", "deepseek_v3"),
    "deepseek_v4": ("its attention compresses keys and its residual has several streams", "deepseek_v3"),
    "phi4_multimodal": ("adapters for vision and speech are in its layers", "phi3"),
    "phimoe": ("its router is not written down", "mixtral"),
    "cohere2": ("its layers are not written down", "cohere"),
    "mllama_text_model": ("some of its layers attend to an image", "llama"),
    "granitemoehybrid": (_STATE_SPACE, "granite"),
    "nemotron_h": (_STATE_SPACE, "llama"),
    "falcon_h1": (_STATE_SPACE, "falcon"),
    "mamba": (_STATE_SPACE, "llama"),
    "mamba2": (_STATE_SPACE, "llama"),
}

_CANONICAL_GPT2 = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
# Further names of a key: the config class's `attribute_map`, or what the repository's own code called it.
OTHER_KEYS: dict[str, dict[str, str]] = {
    "gpt2": {name: _GPT2_KEYS[name] for name in _CANONICAL_GPT2},
    "gptj": {name: _GPT2_KEYS[name] for name in _CANONICAL_GPT2},
    "bloom": {
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "n_embed": "hidden_size",
        "n_embd": "hidden_size",
    },
    "mpt": {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
    "falcon": {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
        "n_embed": "hidden_size",
    },
    "phi": {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_key_value_heads",
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
    },
    "mixtral": {"num_experts": "num_local_experts"},
    "llama4_text": {"num_experts": "num_local_experts"},
    "gpt_oss": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "olmoe": {"num_local_experts": "num_experts"},
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts"},
    "glm4_moe": {"num_local_experts": "n_routed_experts"},
}
