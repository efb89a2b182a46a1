"""Models for a measuring design: for each family, a config.json of given sizes in the family's own keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Families that have no use for one leave it out."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int = 8
    num_experts_per_tok: int = 2


@dataclass(frozen=True)
class Family:
    """How a family's config is written, and what a design may ask of it."""

    keys: Callable[[Shape], dict[str, Any]]
    attention_modules: tuple[str, ...] = ("q_proj", "v_proj")
    head_name: str = "lm_head"
    has_sdpa: bool = True
    is_moe: bool = False
    is_tied: bool = False

    @property
    def head(self) -> str | None:
        """The output layer, where it is a module of its own weights that `modules_to_save` can name."""
        return None if self.is_tied else self.head_name


def hf_config(model_type: str, shape: Shape) -> dict[str, Any]:
    return {"model_type": model_type, **FAMILIES[model_type].keys(shape)}


def num_params(model_type: str, shape: Shape) -> int:
    """Rough number of parameters, to bound a design: attention, MLP (gated where it might be), embeddings."""
    family = FAMILIES[model_type]
    attention = 2 * shape.hidden_size * shape.head_dim * (shape.num_heads + shape.num_kv_heads)
    experts = shape.num_experts if family.is_moe else 1
    mlp = 3 * shape.hidden_size * shape.intermediate_size * experts
    return shape.num_layers * (attention + mlp) + 2 * shape.vocab_size * shape.hidden_size


def _llama(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads, "vocab_size": shape.vocab_size,
        "max_position_embeddings": 32768,
    }  # fmt: skip


def _with(base: Callable[[Shape], dict[str, Any]], **more: Any) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: {**base(shape), **more}


def _head_dim(base: Callable[[Shape], dict[str, Any]]) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: {**base(shape), "head_dim": shape.head_dim}


def _moe(base: Callable[[Shape], dict[str, Any]], experts: str, width: str) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: {
        **base(shape), experts: shape.num_experts, "num_experts_per_tok": shape.num_experts_per_tok,
        width: shape.intermediate_size,
    }  # fmt: skip


def _mha(shape: Shape) -> dict[str, Any]:
    return {**_llama(shape), "num_key_value_heads": shape.num_heads}


def _gpt2(shape: Shape) -> dict[str, Any]:
    return {
        "n_embd": shape.hidden_size, "n_inner": shape.intermediate_size, "n_layer": shape.num_layers,
        "n_head": shape.num_heads, "vocab_size": shape.vocab_size, "n_positions": 8192,
    }  # fmt: skip


def _neox(shape: Shape) -> dict[str, Any]:
    keys = _llama(shape)
    del keys["num_key_value_heads"]
    return keys


def _falcon(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden_size, "ffn_hidden_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads,
        "vocab_size": shape.vocab_size,
    }  # fmt: skip


def _opt(shape: Shape) -> dict[str, Any]:
    return {
        "hidden_size": shape.hidden_size, "ffn_dim": shape.intermediate_size,
        "word_embed_proj_dim": shape.hidden_size, "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads, "vocab_size": shape.vocab_size,
        "max_position_embeddings": 8192,
    }  # fmt: skip


def _bloom(shape: Shape) -> dict[str, Any]:
    return {"hidden_size": shape.hidden_size, "n_layer": shape.num_layers, "n_head": shape.num_heads,
            "vocab_size": shape.vocab_size}  # fmt: skip


def _mpt(shape: Shape) -> dict[str, Any]:
    return {"d_model": shape.hidden_size, "n_layers": shape.num_layers, "n_heads": shape.num_heads,
            "vocab_size": shape.vocab_size, "max_seq_len": 8192}  # fmt: skip


def _mla(shape: Shape) -> dict[str, Any]:
    return {
        **_mha(shape), "q_lora_rank": shape.hidden_size // 4, "kv_lora_rank": shape.hidden_size // 8,
        "qk_nope_head_dim": shape.head_dim, "qk_rope_head_dim": shape.head_dim // 2,
        "v_head_dim": shape.head_dim, "n_routed_experts": shape.num_experts, "n_shared_experts": 1,
        "num_experts_per_tok": shape.num_experts_per_tok, "moe_intermediate_size": shape.intermediate_size,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    }  # fmt: skip


def _glm4_moe(shape: Shape) -> dict[str, Any]:
    return {
        **_head_dim(_llama)(shape), "n_routed_experts": shape.num_experts, "n_shared_experts": 1,
        "num_experts_per_tok": shape.num_experts_per_tok, "moe_intermediate_size": shape.intermediate_size,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    }  # fmt: skip


_LLAMA = Family(_llama)
_FUSED_QKV = ("query_key_value",)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": Family(_with(_llama, sliding_window=1024)),
    "qwen2": _LLAMA,
    "qwen3": Family(_head_dim(_llama)),
    "gemma": Family(_head_dim(_llama), is_tied=True),
    "gemma2": Family(_with(_head_dim(_llama), sliding_window=1024), is_tied=True),
    "gemma3_text": Family(_with(_head_dim(_llama), sliding_window=512), is_tied=True),
    "phi": Family(_mha),
    "phi3": Family(_with(_llama, pad_token_id=0), ("qkv_proj",)),
    "gpt2": Family(_gpt2, ("c_attn",), is_tied=True),
    "gpt_neox": Family(_neox, _FUSED_QKV, head_name="embed_out"),
    "gptj": Family(_with(_gpt2, rotary_dim=32), has_sdpa=False),
    "falcon": Family(_falcon, _FUSED_QKV, is_tied=True),
    "opt": Family(_opt, is_tied=True),
    "bloom": Family(_bloom, _FUSED_QKV, has_sdpa=False, is_tied=True),
    "mpt": Family(_mpt, ("Wqkv",), has_sdpa=False, is_tied=True),
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": Family(_with(_llama, sliding_window=1024)),
    "smollm3": Family(_with(_llama, pad_token_id=0), is_tied=True),
    "starcoder2": Family(_llama, is_tied=True),
    "granite": _LLAMA,
    "stablelm": _LLAMA,
    "cohere": Family(_llama, is_tied=True),
    "mixtral": Family(_moe(_llama, "num_local_experts", "intermediate_size"), is_moe=True),
    "qwen3_moe": Family(_moe(_head_dim(_llama), "num_experts", "moe_intermediate_size"), is_moe=True),
    "qwen2_moe": Family(
        lambda s: {**_moe(_llama, "num_experts", "moe_intermediate_size")(s),
                   "shared_expert_intermediate_size": s.intermediate_size},
        is_moe=True,
    ),
    "gpt_oss": Family(
        _with(_head_dim(_moe(_llama, "num_local_experts", "intermediate_size")), sliding_window=128),
        has_sdpa=False, is_moe=True,
    ),
    "olmoe": Family(_moe(_llama, "num_experts", "intermediate_size"), is_moe=True),
    "deepseek_v2": Family(_mla, ("q_a_proj", "o_proj"), is_moe=True),
    "deepseek_v3": Family(_mla, ("q_a_proj", "o_proj"), is_moe=True),
    "glm": Family(_with(_head_dim(_llama), pad_token_id=0)),
    "glm4": Family(_with(_head_dim(_llama), pad_token_id=0)),
    "glm4_moe": Family(_glm4_moe, is_moe=True),
    "ministral3": Family(_with(_head_dim(_llama), sliding_window=None)),
    "seed_oss": Family(_head_dim(_llama)),
}  # fmt: skip
"""`attention_modules`: what a LoRA of attention alone targets, by the family's own module names."""
