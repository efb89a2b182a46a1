"""Small configurations, one a family, two layers deep, in each family's own Hugging Face spelling.

Dropout probabilities are left at the class defaults, as a fine-tuning run leaves them.
"""

from __future__ import annotations

from typing import Any


def _llama_like(model_type: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        **changes,
    }


# Token ids that the class defaults put beyond such a small vocabulary.
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _llama_like("llama"),
    "mistral": _llama_like("mistral", sliding_window=None),
    "ministral3": _llama_like("ministral3", head_dim=48, **_IDS),
    # Its attention dropout is held against the oracle in test_attention_dropout.py.
    "seed_oss": _llama_like("seed_oss", head_dim=48, attention_dropout=0.0, **_IDS),
    "qwen2": _llama_like("qwen2"),
    "qwen3": _llama_like("qwen3", head_dim=48),
    "gemma": _llama_like("gemma", head_dim=48),
    "gemma2": _llama_like("gemma2", head_dim=48, sliding_window=64, query_pre_attn_scalar=48),
    "gemma3_text": _llama_like("gemma3_text", head_dim=48, sliding_window=64, query_pre_attn_scalar=48),
    "phi": _llama_like("phi", num_key_value_heads=8),
    "phi3": _llama_like("phi3", **_IDS),
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_layer": 2,
        "n_head": 8,
        "vocab_size": 1000,
        "n_positions": 2048,
        **_IDS,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "vocab_size": 1000,
    },
    "gptj": {
        "model_type": "gptj",
        "n_embd": 256,
        "n_layer": 2,
        "n_head": 8,
        "rotary_dim": 16,
        "vocab_size": 1000,
        "n_positions": 2048,
        **_IDS,
    },
    "falcon": {
        "model_type": "falcon",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "vocab_size": 1000,
        **_IDS,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 256,
        "ffn_dim": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "vocab_size": 1000,
        "word_embed_proj_dim": 256,
        **_IDS,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 256, "n_layer": 2, "n_head": 8, "vocab_size": 1000, **_IDS},
    "mpt": {"model_type": "mpt", "d_model": 256, "n_layers": 2, "n_heads": 8, "vocab_size": 1000, "max_seq_len": 2048},
    "olmo": _llama_like("olmo", **_IDS),
    "olmo2": _llama_like("olmo2", **_IDS),
    "olmo3": _llama_like("olmo3", sliding_window=64, **_IDS),
    "smollm3": _llama_like("smollm3", **_IDS),
    "starcoder2": _llama_like("starcoder2", **_IDS),
    "granite": _llama_like("granite"),
    "stablelm": _llama_like("stablelm"),
    "cohere": _llama_like("cohere", **_IDS),
    "mixtral": _llama_like("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _llama_like("qwen3_moe", head_dim=48, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96),
    "qwen2_moe": _llama_like(
        "qwen2_moe",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=352,
    ),
    "gpt_oss": _llama_like("gpt_oss", head_dim=48, num_local_experts=4, num_experts_per_tok=2, sliding_window=64),
    "olmoe": _llama_like("olmoe", num_experts=8, num_experts_per_tok=2, **_IDS),
    "deepseek_v2": _llama_like(
        "deepseek_v2",
        num_key_value_heads=8,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=96,
        first_k_dense_replace=1,
        **_IDS,
    ),
    "deepseek_v3": _llama_like(
        "deepseek_v3",
        num_key_value_heads=8,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=96,
        first_k_dense_replace=1,
        **_IDS,
    ),
    "glm": _llama_like("glm", head_dim=32, **_IDS),
    "glm4": _llama_like("glm4", head_dim=32, **_IDS),
}
