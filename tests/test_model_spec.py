"""ModelSpec says what transformers builds: defaults, old names, biases and norms. The rest it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import InvalidSpecError, MemplanError, NotModelledError, UnknownNameError
from memplan.estimate import estimate
from memplan.hf_config import _defaults, config_keys
from memplan.hf_families import FAMILIES, NOT_MODELLED, TEXT_MODELS_OF_FAMILY
from memplan.model_spec import ModelSpec

TOY: dict[str, Any] = {"num_hidden_layers": 4, "vocab_size": 128, "pad_token_id": 0}
# What a family needs beside TOY to be small and to hold together.
TOY_EXTRA: dict[str, dict[str, Any]] = {
    "gpt2": {"hidden_size": 64, "num_attention_heads": 4},
    "gptj": {"hidden_size": 64, "num_attention_heads": 4, "rotary_dim": 8},
    "bloom": {"hidden_size": 64, "num_attention_heads": 4},
    "mpt": {"hidden_size": 64, "num_attention_heads": 4},
    "opt": {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4},
    "gemma3n_text": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "num_kv_shared_layers": 0,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "deepseek_v3": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
}
WIDTHS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}


def toy(model_type: str, **more: Any) -> dict[str, Any]:
    widths = TOY_EXTRA.get(model_type, WIDTHS)
    if model_type.startswith("deepseek"):
        widths = WIDTHS | widths | {"num_key_value_heads": 4, "moe_intermediate_size": 32}
    return {"model_type": model_type, **TOY, **widths, **more}


def real_config(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    return AutoConfig.for_model(**json.loads(json.dumps(config)))


def real_model(config: dict[str, Any]) -> Any:
    """The transformers model of `config` on the meta device: shapes without storage."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(real_config(config))


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_missing_key_takes_the_default_of_the_installed_config_class(model_type: str) -> None:
    fields = {f.name: f.default for f in dataclasses.fields(type(real_config({"model_type": model_type})))}
    expected = {key: fields[key] for key in config_keys(model_type) if key in fields}
    assert _defaults()[model_type] == expected


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", FAMILIES)
def test_biases_norms_and_widths_are_those_of_the_modules_transformers_builds(model_type: str) -> None:
    config = toy(model_type)
    spec, model = ModelSpec.from_hf_config(config), real_model(config)
    names = [name for name, _ in model.named_parameters()]
    attention = [n for n in names if ".attn." in n or "attention." in n or "self_attn." in n]
    inner = ("q_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "q_a_proj", "kv_a_proj_with_mqa")
    outer = ("o_proj", "out_proj", "dense", "c_proj")

    def has_bias(among: list[str], modules: tuple[str, ...]) -> bool:
        return any(name.split(".")[-2] in modules and name.endswith(".bias") for name in among)

    assert spec.attention_bias == has_bias(attention, inner)
    assert spec.attention_out_bias == has_bias(attention, outer)
    mlp_names = "mlp", ".fc1", ".fc2", "ffn", "feed_forward"
    mlp = [n for n in names if n not in attention and any(name in n for name in mlp_names)]
    assert mlp
    assert spec.mlp_bias == any(n.endswith(("bias",)) and "norm" not in n and "router" not in n for n in mlp)
    assert spec.lm_head_bias == ("lm_head.bias" in names)
    modules = [n for n, _ in model.named_modules()]  # llama4's norm has no weights
    assert spec.qk_norm == any(n.endswith(("q_norm", "q_layernorm", "qk_norm")) for n in modules)
    assert spec.norm_affine == any("norm" in n or "ln_" in n for n in names)
    head = model.get_output_embeddings().weight
    assert spec.tie_word_embeddings == (head is model.get_input_embeddings().weight)
    assert tuple(head.shape) == (spec.vocab_size, spec.word_embed_proj_dim or spec.hidden_size)
    widths = {m.head_dim for n, m in model.named_modules() if hasattr(m, "head_dim") and not spec.is_mla}
    assert widths <= {spec.head_dim, spec.global_head_dim}


@pytest.mark.oracle
@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma2", "hidden_size": 2304},
        {"model_type": "gemma3_text", "num_hidden_layers": 13, "sliding_window_pattern": 3},
        {"model_type": "gemma3n_text", "num_hidden_layers": 13, "num_kv_shared_layers": 3},
        {"model_type": "gemma4_text", "num_hidden_layers": 13},
        {"model_type": "gemma4_unified_text", "num_hidden_layers": 8},
        {"model_type": "gpt_oss", "num_hidden_layers": 5},
        {"model_type": "olmo3", "num_hidden_layers": 9},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 20},
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8},
        {"model_type": "qwen3", "use_sliding_window": True},
        {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 64},
        {"model_type": "smollm3", "no_rope_layer_interval": 3},
        {"model_type": "llama4_text", "num_hidden_layers": 9},
        {"model_type": "llama4_text", "num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0]},
        {"model_type": "llama4_text", "num_hidden_layers": 2, "layer_types": ["full_attention", "chunked_attention"]},
        {"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 64},
        {"model_type": "qwen3_next", "num_hidden_layers": 7},
        {"model_type": "qwen3_5_text", "num_hidden_layers": 5},
        {"model_type": "qwen3_next", "num_hidden_layers": 7, "full_attention_interval": 3},
        {"model_type": "qwen3_next", "num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_sliding_layers_and_rope_flags_are_those_the_config_class_derives(config: dict[str, Any]) -> None:
    spec, real = ModelSpec.from_hf_config(config), real_config(config)
    assert spec.sliding_layers == tuple(i for i, kind in enumerate(real.layer_types) if kind == "sliding_attention")
    layers = range(spec.num_hidden_layers)
    assert list(spec.layer_types or ("full_attention",) * len(layers)) == list(real.layer_types)
    assert [spec.is_linear_layer(i) for i in layers] == [kind == "linear_attention" for kind in real.layer_types]
    if spec.sliding_layers:
        assert spec.sliding_window == real.sliding_window
        assert spec.layer_window(spec.sliding_layers[0]) == real.sliding_window
    assert [spec.has_rope(i) for i in layers] == [
        bool(flag) for flag in getattr(real, "no_rope_layers", None) or [1] * spec.num_hidden_layers
    ]


@pytest.mark.oracle
@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 64},
        {"sliding_window": 64, "sliding_window_pattern": "LLG", "layer_types": ["full_attention"] * 4},
        {"sliding_window": 64, "sliding_window_pattern": 3},
        {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 4},
    ],
)
def test_exaone4_rotates_the_layers_that_its_module_rotates(changes: dict[str, Any]) -> None:
    config = toy("exaone4", **changes)
    spec, model = ModelSpec.from_hf_config(config), real_model(config)
    attentions = [layer.self_attn for layer in model.model.layers]
    assert [spec.has_rope(i) for i in range(4)] == [a.sliding_window is None or a.is_sliding for a in attentions]
    assert spec.sliding_layers == tuple(i for i, a in enumerate(attentions) if a.is_sliding)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("config", "rotary_dim"),
    [
        (toy("phi"), 8),
        (toy("phi", partial_rotary_factor=0.4), 6),
        (toy("phi3"), None),
        (toy("phi3", partial_rotary_factor=0.75), 12),
        (toy("gpt_neox", rotary_pct=1.0), None),
        (toy("gpt_neox"), 4),
        (toy("stablelm"), 4),
        (toy("glm", head_dim=16), 8),
        (
            toy("glm4", head_dim=16, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.25}),
            4,
        ),
    ],
)
def test_partial_rotary(config: dict[str, Any], rotary_dim: int | None) -> None:
    spec = ModelSpec.from_hf_config(config)
    assert spec.rotary_dim == rotary_dim
    rope = next(m for n, m in real_model(config).named_modules() if n.endswith("rotary_emb"))
    assert 2 * rope.inv_freq.numel() == (spec.head_dim if spec.rotary_dim is None else spec.rotary_dim)


OLD_AND_NEW = {
    "falcon-7b before transformers had falcon": (
        {"model_type": "RefinedWebModel", "n_head": 71, "n_layer": 32, "multi_query": True},
        {"model_type": "falcon", "num_kv_heads": 71},
    ),
    "falcon-40b before transformers had falcon": (
        {"model_type": "RefinedWeb", "n_head": 128, "n_head_kv": 8, "n_layer": 60, "hidden_size": 8192},
        {"model_type": "falcon", "num_attention_heads": 128, "num_kv_heads": 8, "num_hidden_layers": 60,
         "hidden_size": 8192, "new_decoder_architecture": True},
    ),
    "phi-2 with remote code": (
        {"model_type": "phi-msft", "n_embd": 2560, "n_head": 32, "n_head_kv": None, "n_inner": None,
         "n_layer": 32, "n_positions": 2048, "resid_pdrop": 0.1, "rotary_dim": 32, "vocab_size": 51200},
        {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
         "resid_pdrop": 0.1, "partial_rotary_factor": 0.4},
    ),
    "bloom": (
        {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16},
        {"model_type": "bloom", "hidden_size": 1024, "n_layer": 24, "n_head": 16},
    ),
    "gpt2 spelt both ways": (
        {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16, "n_inner": None},
        {"model_type": "gpt2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    ),
    "Yi": ({"model_type": "Yi", "num_key_value_heads": 4}, {"model_type": "llama", "num_key_value_heads": 4}),
    "stablelm_epoch": (
        {"model_type": "stablelm_epoch", "rope_pct": 0.5},
        {"model_type": "stablelm", "partial_rotary_factor": 0.5},
    ),
    "experts by their other name": (
        {"model_type": "qwen3_moe", "num_local_experts": 16}, {"model_type": "qwen3_moe", "num_experts": 16}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_AND_NEW)
def test_old_key_names_mean_what_the_new_ones_mean(case: str) -> None:
    old, new = (ModelSpec.from_hf_config(config) for config in OLD_AND_NEW[case])
    assert old == new


def test_falcon_has_one_key_value_head_whatever_num_kv_heads_says() -> None:
    assert ModelSpec.from_hf_config({"model_type": "falcon", "num_kv_heads": 71}).num_key_value_heads == 1
    rw = {"model_type": "falcon", "num_attention_heads": 32, "hidden_size": 2048, "multi_query": False}
    assert ModelSpec.from_hf_config(rw).num_key_value_heads == 32


def test_null_means_null_and_a_missing_key_the_class_default() -> None:
    assert ModelSpec.from_hf_config({"model_type": "mistral"}).sliding_window == 4096
    spec = ModelSpec.from_hf_config({"model_type": "mistral", "sliding_window": None})
    assert spec.sliding_window is None
    assert spec.sliding_layers == ()
    assert (
        ModelSpec.from_hf_config({"model_type": "gemma2", "attn_logit_softcapping": None}).attn_logit_softcapping
        is None
    )
    assert ModelSpec.from_hf_config({"model_type": "llama", "head_dim": None}).head_dim == 128


SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "pad_token_id": 0,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
MULTIMODAL: dict[str, tuple[dict[str, Any], str]] = {
    "gemma3": ({"model_type": "gemma3", "text_config": SIZES}, "gemma3_text"),
    "gemma3 untied": ({"model_type": "gemma3", "tie_word_embeddings": False, "text_config": SIZES}, "gemma3_text"),
    "gemma4": ({"model_type": "gemma4", "vision_config": None,
                "text_config": SIZES | {"vocab_size_per_layer_input": 256, "num_kv_shared_layers": 1,
                                        "layer_types": ["full_attention"] * 2}}, "gemma4_text"),
    "gemma4_unified": ({"model_type": "gemma4_unified", "text_config": SIZES}, "gemma4_unified_text"),
    "llama4": ({"model_type": "llama4", "text_config": SIZES | {"interleave_moe_layer_step": 2}}, "llama4_text"),
    "llama4 tied inside": ({"model_type": "llama4", "tie_word_embeddings": False,
                            "text_config": SIZES | {"tie_word_embeddings": True}}, "llama4_text"),
    "llama4 tied outside": ({"model_type": "llama4", "tie_word_embeddings": True, "text_config": SIZES}, "llama4_text"),
    "paligemma": ({"model_type": "paligemma", "text_config": {"model_type": "gemma", **SIZES}}, "gemma"),
    "llava": ({"model_type": "llava", "text_config": SIZES | {"model_type": "llama"}}, "llama"),
    "llava on mistral": ({"model_type": "llava_next", "text_config": SIZES | {"model_type": "mistral"}}, "mistral"),
    "idefics3": ({"model_type": "idefics3", "tie_word_embeddings": True,
                  "text_config": SIZES | {"model_type": "llama", "tie_word_embeddings": False}}, "llama"),
    "mistral3": ({"model_type": "mistral3", "tie_word_embeddings": False,
                  "text_config": SIZES | {"model_type": "mistral", "tie_word_embeddings": True}}, "mistral"),
    "internvl": ({"model_type": "internvl", "tie_word_embeddings": False,
                  "text_config": SIZES | {"model_type": "qwen2"}}, "qwen2"),
    "qwen2_vl": ({"model_type": "qwen2_vl", **SIZES, **MROPE}, "qwen2"),
    "qwen2_5_vl, flat": ({"model_type": "qwen2_5_vl", "tie_word_embeddings": True, **SIZES, **MROPE}, "qwen2"),
    "qwen2_5_vl": ({"model_type": "qwen2_5_vl",
                    "text_config": {"model_type": "qwen2_5_vl_text", **SIZES, **MROPE}}, "qwen2"),
    "qwen3_vl": ({"model_type": "qwen3_vl", "tie_word_embeddings": True,
                  "text_config": {"model_type": "qwen3_vl_text", **SIZES, "tie_word_embeddings": False}}, "qwen3"),
    "qwen3_5": ({"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": SIZES}, "qwen3_5_text"),
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_multimodal_config_gives_its_language_model_and_says_so(name: str) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    config, model_type = MULTIMODAL[name]
    spec = ModelSpec.from_hf_config(config)
    assert (spec.model_type, spec.part_of) == (model_type, config["model_type"])
    assert any(f"`{config['model_type']}` is estimated" in said for said in spec.left_out)
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(real_config(config))
    inner = getattr(model, "model", model)
    language_model = getattr(inner, "language_model", None) or inner.text_model
    text = {id(p): p.numel() for p in (*language_model.parameters(), model.get_output_embeddings().weight)}
    made = estimate(spec, method="full")
    assert made.num_params == sum(text.values())


def test_a_text_config_may_leave_its_own_type_out() -> None:
    assert ModelSpec.from_hf_config({"model_type": "llava", "text_config": {"vocab_size": 32064}}).model_type == "llama"
    spec = ModelSpec.from_hf_config({"model_type": "gemma3", "text_config": {"hidden_size": 2560}})
    assert (spec.model_type, spec.vocab_size) == ("gemma3_text", 262208)
    spec = ModelSpec.from_hf_config({"model_type": "gemma3n", "text_config": {"num_hidden_layers": 30}})
    assert (spec.model_type, spec.altup_num_inputs, spec.part_of) == ("gemma3n_text", 4, "gemma3n")
    assert any("its image and audio tokens" in note for note in spec.left_out)


GEMMA4 = SIZES | {"model_type": "gemma4_text", "num_hidden_layers": 6, "head_dim": 16}


@pytest.mark.oracle
@pytest.mark.parametrize(
    "config",
    [
        GEMMA4,
        GEMMA4 | {"global_head_dim": 32, "num_global_key_value_heads": 1},  # not without `attention_k_eq_v`
        GEMMA4 | {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
        GEMMA4 | {"layer_types": ["sliding_attention"] * 6},
        GEMMA4 | {"layer_types": ["full_attention"] * 6, "hidden_size_per_layer_input": 0},
        GEMMA4 | {"num_kv_shared_layers": 3, "use_double_wide_mlp": True, "layer_types": ["sliding_attention"] * 2
                  + ["full_attention"] + ["sliding_attention"] * 3},
        GEMMA4 | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
        GEMMA4 | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},  # not enabled
    ],
)  # fmt: skip
def test_gemma4_has_the_parameters_of_its_config_and_of_the_one_that_transformers_writes(
    config: dict[str, Any],
) -> None:
    model = real_model(config)
    num_params = sum(p.numel() for p in model.parameters())
    for told in (config, json.loads(model.config.to_json_string())):
        spec = ModelSpec.from_hf_config(told)
        assert estimate(spec, method="full").num_params == num_params
        layers = [layer.self_attn.head_dim for layer in model.model.layers]
        assert [spec.layer_head_dim(i) for i in range(6)] == layers


GEMMA3N = toy("gemma3n_text")


@pytest.mark.oracle
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_kv_shared_layers": 2, "layer_types": ["full_attention", "sliding_attention"] * 2},
        {
            "intermediate_size": [96, 128, 128, 64],
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5] + [0.0] * 3,
        },
        {"num_hidden_layers": 12, "layer_types": ["full_attention"] * 12, "laurel_rank": 8},
    ],
)
def test_gemma3n_has_the_parameters_of_its_config_and_of_the_one_that_transformers_writes(
    changes: dict[str, Any],
) -> None:
    model = real_model(GEMMA3N | changes)
    num_params = sum(p.numel() for p in model.parameters())
    for told in (GEMMA3N | changes, json.loads(model.config.to_json_string())):
        spec = ModelSpec.from_hf_config(told)
        assert estimate(spec, method="full").num_params == num_params
        layers = model.model.layers
        assert [spec.layer_intermediate_size(i) for i in range(len(layers))] == [
            a.mlp.intermediate_size for a in layers
        ]
        assert list(spec.activation_sparsity_pattern) == [layer.mlp.activation_sparsity for layer in layers]


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", TEXT_MODELS_OF_FAMILY)
def test_a_missing_key_of_a_multimodal_models_text_takes_its_own_default(model_type: str) -> None:
    fields = {f.name: f.default for f in dataclasses.fields(type(real_config({"model_type": model_type})))}
    keys = config_keys(TEXT_MODELS_OF_FAMILY[model_type])
    known = dict(_defaults()[model_type])
    assert known.pop("tie_word_embeddings") is False  # the outer model's, which has the head
    assert known == {key: fields[key] for key in keys if key in fields}


@pytest.mark.parametrize("model_type", NOT_MODELLED)
def test_a_family_that_is_not_modelled_says_why_and_names_the_nearest(model_type: str) -> None:
    assert model_type not in FAMILIES
    with pytest.raises(NotModelledError, match=f"`{model_type}` is not modelled: ") as caught:
        ModelSpec.from_hf_config({"model_type": model_type})
    (near,) = caught.value.near
    assert near in FAMILIES
    assert f"--family {near}" in caught.value.hints[0]


@pytest.mark.oracle
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"interleave_moe_layer_step": 2},
        {"interleave_moe_layer_step": 3},
        {"moe_layers": [0, 3]},
        {"moe_layers": []},
    ],
)
def test_llama4_has_experts_where_its_config_class_says(changes: dict[str, Any]) -> None:
    config = toy("llama4_text", intermediate_size_mlp=192, **changes)
    spec, model = ModelSpec.from_hf_config(config), real_model(config)
    assert [spec.is_moe_layer(i) for i in range(4)] == [layer.is_moe_layer for layer in model.model.layers]
    assert estimate(spec, method="full").num_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_chunk_size": None},
        {"layer_types": ["sliding_attention"] * 4},
        {"moe_layers": 2},
        {"interleave_moe_layer_step": 0},
        {"num_local_experts": 0},
    ],
)
def test_llama4_that_transformers_cannot_build_or_run_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpecError):
        ModelSpec.from_hf_config(toy("llama4_text", **changes))


def test_moe_layers_follow_the_decoder_layers_of_each_family() -> None:
    deepseek = ModelSpec.from_hf_config({"model_type": "deepseek_v3"})
    assert [deepseek.is_moe_layer(i) for i in (0, 2, 3, 60)] == [False, False, True, True]
    assert deepseek.num_moe_layers == 58
    assert (deepseek.qk_head_dim, deepseek.value_head_dim) == (192, 128)
    qwen = ModelSpec.from_hf_config({"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert [qwen.is_moe_layer(i) for i in range(6)] == [False, True, False, False, False, True]
    assert not ModelSpec.from_hf_config({"model_type": "llama"}).is_moe


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "`model_type` is missing"),
        ({"model_type": 3}, "`model_type` is not a string"),
        ({"model_type": "llama", "hidden_size": "4096"}, "`hidden_size`"),
        ({**GEMMA3N, "altup_num_inputs": 0}, "`gemma3n_text` is not built without `altup_num_inputs`"),
        ({**GEMMA3N, "intermediate_size": [96, 128]}, "`intermediate_size` has 2 entries for 4 layers"),
        ({**GEMMA3N, "intermediate_size": [96, 128, 0, 96]}, "`intermediate_size` must be 1 to"),
        ({**GEMMA3N, "activation_sparsity_pattern": 0.95}, "`activation_sparsity_pattern` is not a list"),
        ({**GEMMA3N, "activation_sparsity_pattern": [0.5, 1, 0, 0]}, "`activation_sparsity_pattern` holds shares"),
        ({**GEMMA4, "num_kv_shared_layers": 6}, "`num_kv_shared_layers` (6) leaves some"),
        ({**GEMMA4, "num_kv_shared_layers": 1}, "`num_kv_shared_layers` (1) leaves some"),
        ({**GEMMA4, "num_global_key_value_heads": 3, "attention_k_eq_v": True}, "`num_global_key_value_heads`"),
        ({**GEMMA4, "vocab_size_per_layer_input": 0}, "`hidden_size_per_layer_input` needs"),
        ({**GEMMA4, "per_layer_config": {"0": {"intermediate_size": 32}}}, "`per_layer_config`"),
        ({"model_type": "llama", "hidden_size": None}, "`hidden_size`"),
        ({"model_type": "llama", "hidden_size": -1}, "`hidden_size`"),
        ({"model_type": "llama", "hidden_size": True}, "`hidden_size`"),
        ({"model_type": "llama", "hidden_size": 4096.5}, "`hidden_size`"),
        ({"model_type": "llama", "hidden_size": 10**12, "num_attention_heads": 10**6}, "`hidden_size`"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "`num_hidden_layers`"),
        ({"model_type": "gemma3_text", "num_hidden_layers": 10**9}, "`num_hidden_layers`"),
        ({"model_type": "llama", "vocab_size": float("nan")}, "`vocab_size`"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "must be a multiple of"),
        ({"model_type": "llama", "num_attention_heads": 30}, "not a multiple of `num_attention_heads` (30)"),
        ({"model_type": "llama", "attention_dropout": 1.5}, "`attention_dropout`"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "`sliding_window` is not given"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "1 entries for 26 layers"),
        ({"model_type": "gemma2", "layer_types": ["linear_attention"] * 26}, "`layer_types"),
        ({"model_type": "qwen3_next", "linear_num_key_heads": 3}, "`linear_num_value_heads` (32) must be a multiple"),
        ({"model_type": "qwen3_next", "full_attention_interval": 0}, "`full_attention_interval` is not"),
        ({"model_type": "mixtral", "num_experts_per_tok": 9}, "`num_experts_per_tok` (9)"),
        ({"model_type": "deepseek_v2"}, "`num_experts_per_tok` (0)"),
        ({"model_type": "gpt2", "n_embd": 768, "hidden_size": 1024}, "contradict each other"),
        ({"model_type": "phi", "partial_rotary_factor": 3}, "`partial_rotary_factor`"),
        ({"model_type": "gemma3", "text_config": 5}, "`text_config` is not an object"),
    ],
)  # fmt: skip
def test_a_broken_config_is_refused_in_one_line(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidSpecError) as caught:
        ModelSpec.from_hf_config(config)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        ModelSpec.from_hf_config({"model_type": "qwen33"})
    assert "qwen3" in caught.value.near


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x00\x93NUMPY\xff\xfe", "not text"),
        (b"{", "not JSON"),
        (b"[1]", "holds list"),
        (b'{"model_type": "llama", "vocab_size": NaN}', "NaN"),
        (b"[" * 100_000, "not JSON"),
        (b'{"model_type": "llama", "hidden_size": "x"}', "`hidden_size`"),
    ],
    ids=["binary", "cut off", "a list", "nan", "deep", "string"],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for source in (path, tmp_path, str(path)):
        with pytest.raises(InvalidSpecError, match=r"config\.json") as caught:
            ModelSpec.from_hf_config(source)
        assert says in caught.value.message


def test_a_huge_or_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(InvalidSpecError, match="16 MiB"):
        ModelSpec.from_hf_config(path)
    with pytest.raises(InvalidSpecError, match="No such file"):
        ModelSpec.from_hf_config(tmp_path / "none.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidSpecError, match=r"no `config\.json`"):
        ModelSpec.from_hf_config(tmp_path / "empty")


def test_a_file_gives_the_name_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    spec = ModelSpec.from_hf_config(folder)
    assert (spec.label, spec.torch_dtype) == ("my-llama", "bfloat16")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted({key for model_type in FAMILIES for key in config_keys(model_type)} | {"rope_scaling", "text_config"})


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), JSON_VALUES, max_size=4))
def test_no_config_ends_in_anything_but_a_spec_or_an_error_for_its_user(
    model_type: str, config: dict[str, Any]
) -> None:
    outcome: ModelSpec | MemplanError
    try:
        outcome = ModelSpec.from_hf_config({"model_type": model_type, **config})
    except MemplanError as refusal:
        outcome = refusal
    if isinstance(outcome, MemplanError):
        assert "\n" not in outcome.message
    else:
        assert outcome.num_attention_heads % outcome.num_key_value_heads == 0
        assert ModelSpec.model_validate_json(outcome.model_dump_json()) == outcome


def test_equal_specs_hash_alike_and_reading_one_needs_no_torch() -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    assert hash(ModelSpec.from_hf_config(config)) == hash(ModelSpec.from_hf_config(config))
    heavy = "('torch', 'transformers', 'numpy', 'matplotlib', 'huggingface_hub')"
    code = f"import sys, memplan.catalog as c; c.load('llama-7b'); assert not sys.modules.keys() & set({heavy})"
    subprocess.run([sys.executable, "-c", code], check=True)
