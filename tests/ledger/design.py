"""Which runs the played step is held against: every family with each setting of every knob, drawn to cover pairs.

`combinations()` gives each family its plain runs, then draws (always the same) the runs that bring most pairs of
settings not seen before: over all families any two settings of any two knobs, and in each family any two of those that
change what the layers save. What no library runs is left out by `impossible`, each with its reason.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations as pairs_of
from typing import Any

from memplan.memory.optimizers import OPTIMIZERS
from memplan.train_config import TrainConfig
from tests.oracle.configs import CONFIGS

RUNS_A_FAMILY = 6
RUNS_A_VARIANT = 3
PLAIN: tuple[dict[str, Any], ...] = ({}, {"method": "lora", "checkpointing": "ckpt"}, {"method": "qlora"})
CANDIDATES = 24
"""Draws of which the best is kept."""

WITHOUT_SDPA = ("gptj", "bloom", "mpt", "gpt_oss")
"""`_supports_sdpa` is off in their transformers 5.17 classes: eager is what they run, whatever is asked."""

WITHOUT_BACKBONE = ("llama4_text",)
"""Their `base_model_prefix` is the name they have in a multimodal model."""

WITH_ADAPTED_EXPERTS = ("mixtral", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe")
"""`all-linear` reaches their experts (peft/utils/transformers_weight_conversion.py), which are bare parameters."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptj_tied": ("gptj", {"tie_word_embeddings": True}),
    "llama_multi_query": ("llama", {"num_key_value_heads": 1}),
    "gemma_2b": ("gemma", {"num_key_value_heads": 1, "head_dim": 64}),
    "llama_tied": ("llama", {"tie_word_embeddings": True}),
    "olmo_tied": ("olmo", {"tie_word_embeddings": True}),
    "llama_biased": ("llama", {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True}),
    "mistral_window": ("mistral", {"sliding_window": 64}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}),
    "falcon_40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_rw": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "opt_350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 128}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm_2_12b": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "stablelm_biased": ("stablelm", {"use_qkv_bias": True, "num_key_value_heads": 8}),
    "gemma3n_mixed": (
        "gemma3n_text",
        {
            "intermediate_size": [704, 352, 352, 704],
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 1,
            "altup_num_inputs": 2,
            "altup_correct_scale": False,
        },
    ),
    "gemma4_e2b": ("gemma4_text", {"num_key_value_heads": 1, "num_kv_shared_layers": 1, "use_double_wide_mlp": False}),
    "gemma4_31b": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
        },
    ),
    "gemma4_26b_a4b": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 96,
        },
    ),
    "phi_qk_norm": ("phi", {"qk_layernorm": True}),
    "smollm3_no_rope": ("smollm3", {"no_rope_layers": [1, 0]}),
    "cohere_qk_norm": ("cohere", {"use_qk_norm": True}),
    "glm4_biased": ("glm4", {"attention_bias": True}),
    "deepseek_v2_lite": ("deepseek_v2", {"q_lora_rank": None}),
    "qwen3_moe_dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "qwen3_next_equal_heads": ("qwen3_next", {"linear_num_key_heads": 4, "mlp_only_layers": [0]}),
    "qwen3_5_equal_heads": ("qwen3_5_text", {"linear_num_key_heads": 4, "tie_word_embeddings": True}),
    "qwen3_next_one_key_head": ("qwen3_next", {"linear_num_key_heads": 1, "attention_bias": True}),
    "llama4_scout": ("llama4_text", {"moe_layers": [0, 1], "num_experts_per_tok": 2, "no_rope_layers": [0, 1]}),
    "llama4_maverick": ("llama4_text", {"use_qk_norm": False, "attention_chunk_size": 8192, "moe_layers": [0]}),
    "llama4_dense": ("llama4_text", {"moe_layers": [], "attn_temperature_tuning": False, "attention_bias": True}),
    "exaone4_full": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
}
"""Members of families that are built otherwise than the others."""

KNOBS: dict[str, tuple[Any, ...]] = {
    "method": ("full", "lora", "qlora"),
    "checkpointing": ("none", "ckpt", "reentrant"),
    "attention": ("sdpa", "eager"),
    "precision": ("bf16", "bf16_autocast", "fp32_autocast", "fp32", "fp16"),
    "stack": ("torch", "torch_chunked", "trainer", "trl"),
    "padding": (False, True),
    "shape": ((1, 128), (2, 96), (3, 50), (1, 257)),
    "accumulation": (1, 2),
    "adapter": ("plain", "dora", "dropout"),
    "adapter_dtype": ("fp32", "bf16"),
    "saved": (None, "head", "embedding"),
    "rank": (16, 4),
    "targets": ("all-linear", "attention"),
    "double_quant": (True, False),
    "kbit_prep": (True, False),
    "optimizer": tuple(name for name in OPTIMIZERS if "ademamix" not in name),
}
LAYERS = ("method", "checkpointing", "attention", "precision", "stack")
"""Knobs that change what the layers save."""
ONLY_WITH_ADAPTERS = ("adapter", "adapter_dtype", "saved", "rank", "targets")
ONLY_QUANTISED = ("double_quant", "kbit_prep")

Choice = dict[str, Any]


@dataclass(frozen=True)
class Combination:
    id: str
    hf_config: dict[str, Any]
    config: TrainConfig


def impossible(family: str, choice: Choice) -> str:
    """Why nobody runs `choice`; empty if it can be run."""
    adapters = choice["method"] != "full"
    if choice["attention"] == "sdpa" and family in WITHOUT_SDPA:
        return "the family has no sdpa: the run is the one with eager attention"
    if not adapters and any(choice[name] != KNOBS[name][0] for name in ONLY_WITH_ADAPTERS):
        return "there are no adapters to have this"
    chunked = choice["stack"] in ("torch_chunked", "trl")
    if chunked and family in WITHOUT_BACKBONE:
        return "TRL 1.16 finds no backbone in the model and fails (`base_model_prefix` names no part of it)"
    if choice["method"] != "qlora" and any(choice[name] != KNOBS[name][0] for name in ONLY_QUANTISED):
        return "nothing is quantised"
    adapts_all = choice["targets"] == "all-linear"
    if adapters and choice["adapter"] != "plain" and adapts_all and family in WITH_ADAPTED_EXPERTS:
        return "PEFT's adapters of bare parameters take neither DoRA nor dropout"
    if choice["saved"] and choice["adapter_dtype"] == "bf16" and _hidden_dtype(choice) not in ("bf16", "autocast"):
        return "a bf16 embedding or head among weights of another dtype: torch multiplies no two dtypes"
    if choice["stack"] == "trl" and choice["padding"] and choice["shape"][0] == 1:
        return "SFTTrainer's collator pads to the longest row of a batch, and this one has one row"
    return ""


def _hidden_dtype(choice: Choice) -> str:
    dtype, _, autocast = choice["precision"].partition("_")
    prepared = choice["method"] == "qlora" and choice["kbit_prep"]
    return autocast or ("fp32" if prepared else dtype)


def _draw(family: str, rng: random.Random) -> Choice:
    while True:
        choice = {name: rng.choice(values) for name, values in KNOBS.items()}
        unused = ONLY_WITH_ADAPTERS + ONLY_QUANTISED if choice["method"] == "full" else ()
        unused += ONLY_QUANTISED if choice["method"] == "lora" else ()
        choice |= {name: KNOBS[name][0] for name in unused}
        if family in WITHOUT_SDPA:
            choice["attention"] = "eager"
        if not impossible(family, choice):
            return choice


def _plain(family: str, **changes: Any) -> Choice:
    plain = {name: values[0] for name, values in KNOBS.items()}
    return {**plain, "attention": "eager" if family in WITHOUT_SDPA else "sdpa", **changes}


def _features(member: str, choice: Choice) -> Iterator[tuple[Any, ...]]:
    for (a, x), (b, y) in pairs_of(choice.items(), 2):
        yield a, x, b, y
        if a in LAYERS and b in LAYERS:
            yield member, a, x, b, y
    for name, value in choice.items():
        yield member, name, value


@cache
def choices() -> tuple[tuple[str, Choice], ...]:
    """(family or variant, choice) of every run."""
    members = [(name, name, RUNS_A_FAMILY) for name in CONFIGS]
    members += [(name, family, RUNS_A_VARIANT) for name, (family, _) in VARIANTS.items()]
    seen: set[tuple[Any, ...]] = set()
    found: list[tuple[str, Choice]] = []
    for member, family, count in members:
        rng = random.Random(member)
        for number in range(count):
            drawn = [_draw(family, rng) for _ in range(CANDIDATES)]
            if number < len(PLAIN) and member == family:
                drawn = [_plain(family, **PLAIN[number])]
            best = max(drawn, key=lambda choice: len(set(_features(member, choice)) - seen))
            seen.update(_features(member, best))
            found.append((member, best))
    return tuple(found)


def combinations() -> list[Combination]:
    return [_combination(member, choice) for member, choice in choices()]


def _combination(member: str, choice: Choice) -> Combination:
    family, changes = VARIANTS.get(member, (member, {}))
    return Combination(_id(member, choice), {**CONFIGS[family], **changes}, _train_config(family, choice))


def _train_config(family: str, choice: Choice) -> TrainConfig:
    dtype, _, autocast = choice["precision"].partition("_")
    stack, _, chunked = choice["stack"].partition("_")
    micro_batch_size, seq_len = choice["shape"]
    fields: dict[str, Any] = {
        "method": choice["method"],
        "stack": stack,
        "micro_batch_size": micro_batch_size,
        "seq_len": seq_len,
        "gradient_accumulation_steps": choice["accumulation"],
        "padding": choice["padding"],
        "gradient_checkpointing": choice["checkpointing"] != "none",
        "reentrant": choice["checkpointing"] == "reentrant",
        "attention": choice["attention"],
        "weight_dtype": dtype,
        "autocast": bool(autocast),
        "optimizer": choice["optimizer"],
        "loss": "chunked" if chunked or stack == "trl" else "full",
    }
    if choice["method"] != "full":
        fields |= {
            "rank": choice["rank"],
            "target_modules": _targets(family, choice["targets"]),
            "adapter_dtype": choice["adapter_dtype"],
            "use_dora": choice["adapter"] == "dora",
            "lora_dropout": 0.1 if choice["adapter"] == "dropout" else 0.0,
            "modules_to_save": _saved_module(family, choice["saved"]),
        }
    if choice["method"] == "qlora":
        fields |= {"double_quant": choice["double_quant"], "kbit_prep": choice["kbit_prep"]}
    return TrainConfig(**fields)


LINEAR_NAMES = {
    "llama4_text": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
"""What `all-linear` comes down to without a router that PEFT adapts and cannot call."""


EMBEDDING_NAMES = {
    "gpt2": "wte", "gptj": "wte", "mpt": "wte", "gpt_neox": "embed_in", "falcon": "word_embeddings",
    "bloom": "word_embeddings",
}  # fmt: skip


ATTENTION_NAMES: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn",), "gpt_neox": ("query_key_value",), "falcon": ("query_key_value",), "mpt": ("Wqkv",),
    "bloom": ("query_key_value",), "phi3": ("qkv_proj",), "deepseek_v2": ("kv_b_proj",), "deepseek_v3": ("kv_b_proj",),
}  # fmt: skip


def _attention_names(family: str) -> tuple[str, ...]:
    """What articles adapt: query and value, or what they are fused into."""
    return ATTENTION_NAMES.get(family, ("q_proj", "v_proj"))


def _targets(family: str, which: str) -> Any:
    return LINEAR_NAMES.get(family, which) if which == "all-linear" else _attention_names(family)


def _saved_module(family: str, which: str | None) -> tuple[str, ...]:
    if which is None:
        return ()
    head = "embed_out" if family == "gpt_neox" else "lm_head"
    return (head if which == "head" else EMBEDDING_NAMES.get(family, "embed_tokens"),)


def _id(member: str, choice: Choice) -> str:
    """The member, the method, and every setting that is not the knob's first."""
    told = {
        "shape": lambda shape: "{}x{}".format(*shape),
        "padding": lambda _: "padded",
        "accumulation": lambda steps: f"acc{steps}",
        "adapter_dtype": lambda dtype: f"adapters_{dtype}",
        "saved": lambda which: f"saves_{which}",
        "rank": lambda rank: f"r{rank}",
        "double_quant": lambda _: "single_quant",
        "kbit_prep": lambda _: "unprepared",
    }
    parts = [member, choice["method"]]
    for name, value in choice.items():
        if name != "method" and value != KNOBS[name][0]:
            parts.append(told.get(name, str)(value))
    return "-".join(parts)
