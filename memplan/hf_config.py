"""From a Hugging Face `config.json` to ModelSpec's fields.

A missing key takes the default of the transformers 5.17 config class (`data/hf_defaults.json`, compared with
the installed classes by a test), so a partial dict means what `AutoConfig.for_model(**dict)` means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from memplan.errors import InvalidSpecError, NotModelledError, UnknownNameError
from memplan.hf_families import (
    FAMILIES,
    FLAT_TEXT_CONFIGS,
    NOT_MODELLED,
    OLD_MODEL_TYPES,
    OTHER_KEYS,
    TEXT_MODEL_TYPES,
    TEXT_MODELS_OF_FAMILY,
    WITH_OWN_HEAD,
    Family,
)
from memplan.hf_rules import FAMILY_RULES, fill_rotary, fill_sliding, fill_widths

MAX_FILE_BYTES = 16 * 2**20
_WANTED = ("give a Hugging Face `config.json`, or a folder that holds one",)

# ModelSpec's fields that a config may carry, most under the same name.
_PLAIN = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "attention_bias",
    "initializer_range", "attention_out_bias", "mlp_bias", "qk_norm", "norm_affine", "attention_dropout",
    "hidden_dropout", "embedding_dropout", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
    "alibi", "clip_qkv",
    "parallel_residual", "new_decoder_architecture", "multi_query", "num_ln_in_parallel_attn",
    "do_layer_norm_before", "word_embed_proj_dim", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "num_shared_experts", "shared_expert_intermediate_size",
    "first_k_dense_replace", "decoder_sparse_step",
    "mlp_only_layers", "n_group", "topk_group", "topk_method", "norm_topk_prob", "output_router_logits",
    "attention_chunk_size", "attn_temperature_tuning",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp", "hidden_size_per_layer_input",
    "vocab_size_per_layer_input", "altup_num_inputs", "altup_correct_scale", "laurel_rank",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
# Keys that decide one of those fields without being one.
_DECIDING = (
    "head_dim", "rotary_dim", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers",
    "no_rope_layer_interval", "_remove_final_layer_norm",
)  # fmt: skip
_HEADS_OF_FULL_LAYERS = ("global_head_dim", "num_global_key_value_heads", "per_layer_config")
# Those of one family.
_FURTHER_KEYS = {
    "llama4_text": ("moe_layers", "interleave_moe_layer_step"),
    "exaone4": ("sliding_window_pattern",),
    "gemma3_text": ("sliding_window_pattern",),
    "gemma3n_text": ("activation_sparsity_pattern",),
    "gemma4_text": ("enable_moe_block", *_HEADS_OF_FULL_LAYERS),
    "gemma4_unified_text": ("use_bidirectional_attention", *_HEADS_OF_FULL_LAYERS),
    "mpt": ("attn_config",),
}
_CATALOGUE: dict[str, type] = {
    "name": str, "aliases": list, "source": str, "num_parameters": int, "hf_repo": str, "notes": list,
    "left_out": list,
}  # fmt: skip
# Keys that make transformers build or compute something memplan has no part for.
_NOT_MODELLED = {
    "add_cross_attention": "cross-attention is left out",
    "reorder_and_upcast_attn": "attention in fp32 (`reorder_and_upcast_attn`) is estimated as ordinary",
    "use_bidirectional_attention": "bidirectional attention is estimated as causal",
    "apply_residual_connection_post_layernorm": "the residual is taken before the norm, not after it",
}

# What the multimodal class does beside its language model where there is nothing but text.
_ON_TEXT_TOO = {
    "gemma3n": (
        "on text, too, `gemma3n` runs the two projections of its image and audio tokens over every token, which is not "
        "counted",
    )
}

_OF_IMAGES = "vision"
"""gemma4's `use_bidirectional_attention` where it is of the tokens of images alone."""


def read_config(config: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    """The JSON object of `config` (a dict, a file, a folder with a `config.json`), and its name in messages.

    Raises:
        InvalidSpecError: nothing there, too large, or not one JSON object of finite numbers.
    """
    if isinstance(config, Mapping):
        return dict(config), ""
    path = Path(config)
    try:
        if path.is_dir():
            path = path / "config.json"
            if not path.is_file():
                raise InvalidSpecError(f"{config}: the folder holds no `config.json`", hints=_WANTED)
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)  # a device or a pipe has no size to ask for
        if len(content) > MAX_FILE_BYTES:
            size = MAX_FILE_BYTES // 2**20
            raise InvalidSpecError(f"{path}: above {size} MiB, too large for a `config.json`", hints=_WANTED)
        raw = json.loads(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except OSError as error:
        raise InvalidSpecError(f"{path}: {error.strerror or error}", hints=_WANTED) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidSpecError):
            raise
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else str(error).splitlines()[0]
        raise InvalidSpecError(
            f"{path}: not JSON: {reason}",
            hints=_WANTED,
        ) from None
    if not isinstance(raw, dict):
        raise InvalidSpecError(f"{path}: holds {type(raw).__name__}, not a JSON object", hints=_WANTED)
    raw.setdefault("name", path.parent.name if path.name == "config.json" else path.stem)
    return raw, str(path)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(files("memplan").joinpath("data/hf_defaults.json").read_bytes())
    return table


def config_keys(model_type: str) -> tuple[str, ...]:
    """Keys of that family's config that memplan reads, where its config class has them."""
    family = FAMILIES[model_type]
    extra = _FURTHER_KEYS.get(model_type, ())
    return tuple(dict.fromkeys([*(family.keys.get(name, name) for name in _PLAIN), *_DECIDING, *extra]))


def canonical_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """ModelSpec's fields, from a config as its file has it.

    Raises:
        UnknownNameError: a `model_type` that memplan does not know.
        InvalidSpecError: no `model_type`, or a key of the wrong kind.
    """
    text, part_of = _text_model(raw)
    named = text.get("model_type")
    if not isinstance(named, str):
        raise InvalidSpecError(
            "`model_type` is missing" if named is None else "`model_type` is not a string",
            hints=["it is the first key of a Hugging Face `config.json`, such as `llama`"],
        )
    model_type = OLD_MODEL_TYPES.get(named) or TEXT_MODELS_OF_FAMILY.get(named, named)
    if model_type not in FAMILIES:
        raise _unknown(named, part_of)
    known = _defaults()[named if named in TEXT_MODELS_OF_FAMILY else model_type]
    config = known | _given(model_type, named, text)
    family = FAMILIES[model_type]

    fields: dict[str, Any] = {"model_type": model_type}
    for name in _PLAIN:
        key = family.keys.get(name, name)
        if key in known:  # a key that the config class lacks has no effect on the model
            fields[name] = config[key]
    fields |= family.fixed
    fill_widths(fields, config, family)
    fill_sliding(fields, config, family)
    fill_rotary(fields, config, family)
    if model_type in FAMILY_RULES:
        FAMILY_RULES[model_type](fields, config)
    left_out = _left_out(model_type, family, text)
    if part_of is not None:
        left_out.insert(0, f"only the language model of `{part_of}` is estimated: its other towers are left out")
        left_out += _ON_TEXT_TOO.get(part_of, ())
    fields["part_of"] = part_of
    if part_of == "gemma4_unified" and config.get("use_bidirectional_attention") == _OF_IMAGES:
        fields["masks_blocks"] = True

    for name in (
        "num_experts",
        "num_experts_per_tok",
        "shared_expert_intermediate_size",
        "num_shared_experts",
    ):
        fields[name] = fields.get(name) or 0
    fields["mlp_only_layers"] = fields.get("mlp_only_layers") or ()
    fields["quantization_config"] = raw.get("quantization_config") or None
    dtype = text.get("dtype") or text.get("torch_dtype") or raw.get("dtype") or raw.get("torch_dtype")
    fields["torch_dtype"] = dtype if isinstance(dtype, str) else None
    fields |= {k: raw[k] for k, kind in _CATALOGUE.items() if isinstance(raw.get(k), kind)}
    fields["left_out"] = tuple(dict.fromkeys([*fields.get("left_out", ()), *left_out]))
    return fields


def _text_model(raw: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The language model's part of a config, and the `model_type` of what it is a part of."""
    outer = str(raw.get("model_type"))
    if "text_config" not in raw and outer not in TEXT_MODEL_TYPES:
        return dict(raw), None
    nested = raw.get("text_config") or (raw if outer in FLAT_TEXT_CONFIGS else {})
    if not isinstance(nested, Mapping):
        raise InvalidSpecError("`text_config` is not an object")
    text = dict(nested)
    if nested is raw or text.get("model_type") is None:
        text["model_type"] = TEXT_MODEL_TYPES.get(outer)
    if "tie_word_embeddings" in raw and outer not in WITH_OWN_HEAD:
        # the head belongs to the outer model, whose word counts (`tie_weights`)
        text["tie_word_embeddings"] = raw["tie_word_embeddings"]
    return text, outer


def _unknown(named: str, part_of: str | None) -> UnknownNameError:
    """Of a family that is not modelled: why, where that is known, and the nearest that is."""
    if named not in NOT_MODELLED:
        return UnknownNameError("model type", named, FAMILIES)
    why, nearest = NOT_MODELLED[named]
    whose = f", the language model of `{part_of}`," if part_of else ""
    return NotModelledError(f"the family `{named}`{whose} is not modelled: {why}", nearest)


def _given(model_type: str, named: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says, under the key names of its family's config class."""
    given = dict(text)
    for other, key in OTHER_KEYS.get(model_type, {}).items():
        if other in given:
            if key in given and given[key] != given[other]:
                raise InvalidSpecError(f"`{key}` ({given[key]}) and `{other}` ({given[other]}) contradict each other")
            given[key] = given.pop(other)
    if named == "RefinedWeb":  # falcon-40b's own code: grouped queries with no key that says so
        given.setdefault("new_decoder_architecture", True)
    return given


def _left_out(model_type: str, family: Family, text: Mapping[str, Any]) -> list[str]:
    notes = [note for key, note in _NOT_MODELLED.items() if text.get(key) not in (None, False, _OF_IMAGES)]
    if model_type in ("deepseek_v3", "glm4_moe") and text.get("num_nextn_predict_layers"):
        notes.append("the multi-token-prediction layer is left out, as transformers leaves it out")
    accepted = {*OTHER_KEYS.get(model_type, ()), *family.keys.values()}
    for name, key in family.keys.items():
        if key != name and name in text and key not in text and name not in accepted and name in _PLAIN[:5]:
            notes.append(f"`{name}` has no effect on `{model_type}`, which reads `{key}`")
    return notes
