"""Which `target_modules` and `modules_to_save` are refused, and how much the others train: as in PEFT itself."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import MemplanError, ModelSpec, estimate

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
GATED = {**TINY, "intermediate_size": 96, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 320},
    "mixtral": {**GATED, "num_local_experts": 4},
    "qwen2_moe": {**GATED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48},
    "qwen3_moe": {**GATED, **EXPERTS, "num_experts": 4, "head_dim": 16},
    "qwen3_next": {
        **GATED, **EXPERTS, "num_experts": 4, "head_dim": 16, "shared_expert_intermediate_size": 48,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16,
        "full_attention_interval": 2,
    },
    "olmoe": {**GATED, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**GATED, "num_local_experts": 4, "head_dim": 16},
    "deepseek_v3": {
        **GATED, **EXPERTS, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
}  # fmt: skip
FUSED = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate",
    "gate_up_proj",
    "experts",
    "experts.0.up_proj",
    "gate_proj,up_proj",
)
NAMED: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "self_attn.q_proj", "lm_head", "embed_tokens", "foo", "foo,q_proj", "*_proj", "mlp",
              "mlp,q_proj", "input_layernorm", "rotary_emb"),
    "gpt2": ("c_attn", "wte", "q_proj"),
    "mixtral": ("w1", "w2", "w3", "w1,w3", "block_sparse_moe.gate", "experts.0.w2", "gate_up_proj", "down_proj"),
    "qwen2_moe": ("gate", "gate_proj", "experts", "shared_expert_gate", "down_proj"),
    "qwen3_moe": FUSED,
    "qwen3_next": (*FUSED, "in_proj_qkvz", "in_proj_ba,q_proj", "shared_expert_gate", "linear_attn", "A_log", "conv1d"),
    "olmoe": FUSED,
    "gpt_oss": ("q_proj", "router", "experts", "gate_up_proj"),
    "deepseek_v3": FUSED,
}  # fmt: skip
CASES = [(model, targets, ()) for model, named in NAMED.items() for targets in named] + [
    ("llama", "q_proj", ("foo",)),
    ("llama", "q_proj", ("norm",)),
    ("llama", "q_proj", ("embed_tokens",)),
    ("llama", "q_proj", ("q_proj",)),
    ("llama", "q_proj,v_proj", ("q_proj",)),
    ("llama", "q_proj,v_proj", ("_proj",)),
    ("llama", "all-linear", ("proj",)),
]


def trained_by_peft(model: str, targets: str, saved: tuple[str, ...]) -> int | None:
    """Trained parameters, or None where PEFT refuses."""
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model, **MODELS[model]))
    names = targets if targets == "all-linear" else targets.split(",")
    try:
        made = peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules=names, modules_to_save=list(saved) or None)
        )
    except (ValueError, TypeError):
        return None
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "targets", "saved"), CASES, ids=str)
def test_as_peft(model: str, targets: str, saved: tuple[str, ...]) -> None:
    spec = ModelSpec.from_hf_config({"model_type": model, **MODELS[model]})
    try:
        run = estimate(spec, rank=4, seq_len=32, stack="torch", target_modules=targets, modules_to_save=saved)
        ours: int | None = run.num_trainable_params
    except MemplanError:
        ours = None
    assert ours == trained_by_peft(model, targets, saved)


def warned(targets: str, saved: tuple[str, ...] = ()) -> tuple[str, ...]:
    return estimate("smollm2-135m", seq_len=32, target_modules=targets, modules_to_save=saved).warnings


def test_a_name_that_peft_passes_over_is_warned_of() -> None:
    assert warned("q_proj") == ()
    assert "`c_attn` in `target_modules`" in warned("q_proj,c_attn")[0]
    assert "`score` in `modules_to_save`" in warned("q_proj", ("score",))[0]


@pytest.mark.parametrize("targets", ["model.layers.0.self_attn.q_proj", "q_proj,0.self_attn.v_proj"])
def test_a_name_in_one_layer_only_is_refused(targets: str) -> None:
    """PEFT would take it; here the layers of a kind are one."""
    with pytest.raises(MemplanError, match="is of one layer"):
        warned(targets)


def test_a_part_that_would_be_trained_whole_is_refused() -> None:
    """PEFT would copy all of it, which is not counted."""
    with pytest.raises(MemplanError, match="`mlp` in `modules_to_save`"):
        warned("q_proj", ("mlp",))


@pytest.mark.parametrize("fields", [{"target_modules": ()}, {"target_modules": ("",)}, {"modules_to_save": ("",)}])
def test_an_empty_name_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(MemplanError, match="name"):
        estimate("smollm2-135m", **fields)
