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

from memplan.errors import InvalidSpecError, UnknownNameError
from memplan.hf_families import FAMILIES, OLD_MODEL_TYPES, OTHER_KEYS, TEXT_MODEL_TYPES, Family

MAX_FILE_BYTES = 16 * 2**20
MAX_LAYERS = 2**12

# ModelSpec's fields that a config may carry, most under the same name.
_PLAIN = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings", "tie_word_embeddings", "hidden_act", "attention_bias",
    "attention_out_bias", "mlp_bias", "qk_norm", "norm_affine", "attention_dropout", "hidden_dropout",
    "embedding_dropout", "sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "alibi",
    "parallel_residual", "new_decoder_architecture", "multi_query", "num_ln_in_parallel_attn",
    "do_layer_norm_before", "word_embed_proj_dim", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "num_shared_experts", "shared_expert_intermediate_size",
    "first_k_dense_replace", "decoder_sparse_step",
    "mlp_only_layers", "n_group", "topk_group", "topk_method", "norm_topk_prob", "output_router_logits",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
# Keys that decide one of those fields without being one.
_DECIDING = (
    "head_dim", "rotary_dim", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers",
    "no_rope_layer_interval", "_remove_final_layer_norm",
)  # fmt: skip
_CATALOGUE: dict[str, type] = {
    "name": str, "aliases": list, "source": str, "num_parameters": int, "hf_repo": str, "notes": list,
}  # fmt: skip
# Keys that make transformers build or compute something memplan has no part for.
_NOT_MODELLED = {
    "add_cross_attention": "cross-attention is left out",
    "reorder_and_upcast_attn": "attention in fp32 (`reorder_and_upcast_attn`) is estimated as ordinary",
    "use_bidirectional_attention": "bidirectional attention is estimated as causal",
    "apply_residual_connection_post_layernorm": "the residual is taken before the norm, not after it",
}


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
                raise InvalidSpecError(f"{config}: the folder holds no `config.json`")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidSpecError(
                f"{path}: above {MAX_FILE_BYTES // 2**20} MiB, too large for a `config.json`"
            )
        text = path.read_bytes().decode("utf-8-sig")
        raw = json.loads(text, parse_constant=_refuse_constant)
    except OSError as error:
        raise InvalidSpecError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidSpecError):
            raise
        reason = "it is not text" if isinstance(error, UnicodeDecodeError) else str(error).splitlines()[0]
        raise InvalidSpecError(
            f"{path}: not JSON: {reason}",
            hints=["give a Hugging Face `config.json`, or a folder that holds one"],
        ) from None
    if not isinstance(raw, dict):
        raise InvalidSpecError(f"{path}: holds {type(raw).__name__}, not a JSON object")
    raw.setdefault("name", path.parent.name if path.name == "config.json" else path.stem)
    return raw, str(path)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


@cache
def _defaults() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(
        files("memplan").joinpath("data/hf_defaults.json").read_bytes()
    )
    return table


def config_keys(model_type: str) -> tuple[str, ...]:
    """Keys of that family's config that memplan reads, where its config class has them."""
    family = FAMILIES[model_type]
    extra = {"gemma3_text": ("sliding_window_pattern",), "mpt": ("attn_config",)}.get(model_type, ())
    return tuple(dict.fromkeys([*(family.keys.get(name, name) for name in _PLAIN), *_DECIDING, *extra]))


def canonical_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """ModelSpec's fields, from a config as its file has it.

    Raises:
        UnknownNameError: a `model_type` that memplan does not know.
        InvalidSpecError: no `model_type`, or a key of the wrong kind.
    """
    text, notes = _text_model(raw)
    named = text.get("model_type")
    if not isinstance(named, str):
        raise InvalidSpecError(
            "`model_type` is missing" if named is None else "`model_type` is not a string",
            hints=["it is the first key of a Hugging Face `config.json`, such as `llama`"],
        )
    model_type = OLD_MODEL_TYPES.get(named, named)
    if model_type not in FAMILIES:
        raise UnknownNameError("model type", named, FAMILIES)
    known = _defaults()[model_type]
    config = known | _given(model_type, named, text)
    family = FAMILIES[model_type]

    fields: dict[str, Any] = {"model_type": model_type}
    for name in _PLAIN:
        key = family.keys.get(name, name)
        if key in known:  # a key that the config class lacks has no effect on the model
            fields[name] = config[key]
    fields |= family.fixed
    _fill_widths(fields, config, family)
    _fill_sliding(fields, config, family)
    _fill_rotary(fields, config, family)
    if model_type in _FAMILY_RULES:
        _FAMILY_RULES[model_type](fields, config)
    notes += _notes(model_type, family, text)

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
    fields["notes"] = (*fields.get("notes", ()), *notes)
    return fields


def _text_model(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The language model's part of a config, and what is left out of it."""
    if "text_config" not in raw and raw.get("model_type") not in TEXT_MODEL_TYPES:
        return dict(raw), []
    nested = raw.get("text_config") or {}
    if not isinstance(nested, Mapping):
        raise InvalidSpecError("`text_config` is not an object")
    outer = raw.get("model_type")
    text = dict(nested)
    text.setdefault("model_type", TEXT_MODEL_TYPES.get(str(outer)))
    if "tie_word_embeddings" in raw:
        text.setdefault("tie_word_embeddings", raw["tie_word_embeddings"])
    return text, [f"only the text model of `{outer}` is counted; its vision tower and projector are left out"]


def _given(model_type: str, named: str, text: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says, under the key names of its family's config class."""
    given = dict(text)
    for other, key in OTHER_KEYS.get(model_type, {}).items():
        if other in given:
            if key in given and given[key] != given[other]:
                raise InvalidSpecError(
                    f"`{key}` ({given[key]}) and `{other}` ({given[other]}) contradict each other"
                )
            given[key] = given.pop(other)
    if named == "RefinedWeb":  # falcon-40b's own code: grouped queries with no key that says so
        given.setdefault("new_decoder_architecture", True)
    return given


def _whole(fields: Mapping[str, Any], name: str) -> int:
    """A size that other sizes are derived from, before ModelSpec checks the rest."""
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise InvalidSpecError(f"`{name}` must be a whole number above zero, not {value!r:.60}")
    return value


def _fill_widths(fields: dict[str, Any], config: Mapping[str, Any], family: Family) -> None:
    hidden, heads = _whole(fields, "hidden_size"), _whole(fields, "num_attention_heads")
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = heads
    if fields.get("intermediate_size") is None:
        fields["intermediate_size"] = 4 * hidden
    head_dim = None if family.derives_head_dim else config.get("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise InvalidSpecError(
                f"`hidden_size` ({hidden}) is not a multiple of `num_attention_heads` ({heads})",
                hints=[]
                if family.derives_head_dim
                else ["give `head_dim` if the heads are of another width"],
            )
        head_dim = hidden // heads
    fields["head_dim"] = head_dim


def _fill_sliding(fields: dict[str, Any], config: Mapping[str, Any], family: Family) -> None:
    num_layers = _whole(fields, "num_hidden_layers")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    types = config.get("layer_types") if family.sliding not in ("none", "every") else None
    if types is None:
        slides = _sliding_rule(config, family, num_layers, window is not None)
        types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    if not isinstance(types, list | tuple):
        raise InvalidSpecError("`layer_types` is not a list")
    if len(types) != num_layers <= MAX_LAYERS:
        raise InvalidSpecError(f"`layer_types` has {len(types)} entries for {num_layers} layers")
    any_slides = any(kind != "full_attention" for kind in types)
    fields["layer_types"] = tuple(types) if any_slides else ()
    fields["sliding_window"] = window if any_slides else None


def _sliding_rule(config: Mapping[str, Any], family: Family, num_layers: int, has_window: bool) -> list[bool]:
    layers = range(min(num_layers, MAX_LAYERS))
    rule = family.sliding
    if isinstance(rule, int):
        pattern = config.get("sliding_window_pattern") or rule
        if type(pattern) is not int:
            raise InvalidSpecError("`sliding_window_pattern` is not a whole number")
        return [bool((i + 1) % pattern) for i in layers]
    if rule == "none" or not has_window:
        return [False for _ in layers]
    if rule == "every":
        return [True for _ in layers]
    if rule == "no_rope":
        return [not rotates for rotates in _no_rope_layers(config, num_layers)]
    first = config.get("max_window_layers")
    if type(first) is not int:
        raise InvalidSpecError("`max_window_layers` is not a whole number")
    if rule == "upper":
        return [i >= first for i in layers]
    return [bool((i + 1) % 2) and i < first for i in layers]


def _no_rope_layers(config: Mapping[str, Any], num_layers: int) -> list[int]:
    flags = config.get("no_rope_layers")
    if isinstance(flags, list | tuple):
        return list(flags)
    interval = config.get("no_rope_layer_interval")
    if type(interval) is not int or interval < 1:
        raise InvalidSpecError("`no_rope_layer_interval` is not a whole number above zero")
    return [int((i + 1) % interval != 0) for i in range(min(num_layers, MAX_LAYERS))]


def _fill_rotary(fields: dict[str, Any], config: Mapping[str, Any], family: Family) -> None:
    """`rotary_dim` = int(head_dim · partial_rotary_factor), as the rotary modules compute it."""
    if family.rotary_factor is None:
        return
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    for key in family.rotary_factor_keys:
        factor = config.get(key) if factor is None else factor
    factor = family.rotary_factor if factor is None else factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise InvalidSpecError(
            f"`{family.rotary_factor_keys[0]}` must be above 0 and at most 1, not {factor!r:.60}"
        )
    head_dim = _whole(fields, "head_dim")
    rotary = int(head_dim * factor)
    if type(config.get("rotary_dim")) is int:  # the name it had in phi's first repositories
        rotary = config["rotary_dim"]
    fields["rotary_dim"] = rotary if rotary != head_dim else None


def _falcon(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    new = config.get("new_decoder_architecture")
    if not new:  # `num_kv_heads` counts only in the new architecture
        fields["num_key_value_heads"] = 1 if config.get("multi_query") else fields["num_attention_heads"]
    if fields["num_ln_in_parallel_attn"] is None:
        fields["num_ln_in_parallel_attn"] = 2 if new else 1


def _opt(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    if fields["word_embed_proj_dim"] is None:
        fields["word_embed_proj_dim"] = fields["hidden_size"]
    fields["final_norm"] = bool(fields["do_layer_norm_before"]) and not config.get("_remove_final_layer_norm")


def _mpt(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    attention = config.get("attn_config")
    dropout = attention.get("attn_pdrop", 0.0) if isinstance(attention, Mapping) else 0.0
    fields |= {"attention_dropout": dropout, "hidden_dropout": dropout}


def _smollm3(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    fields["no_rope_layers"] = tuple(_no_rope_layers(config, fields["num_hidden_layers"]))


def _gptj(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    rotary = config.get("rotary_dim")
    fields["rotary_dim"] = rotary if rotary != fields["head_dim"] else None


def _deepseek(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    fields["head_dim"] = fields["qk_rope_head_dim"]
    shared, width = fields["num_shared_experts"], fields["moe_intermediate_size"]
    if type(shared) is int and type(width) is int:
        fields["shared_expert_intermediate_size"] = shared * width


_FAMILY_RULES = {
    "falcon": _falcon,
    "opt": _opt,
    "mpt": _mpt,
    "smollm3": _smollm3,
    "gptj": _gptj,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}


def _notes(model_type: str, family: Family, text: Mapping[str, Any]) -> list[str]:
    notes = [note for key, note in _NOT_MODELLED.items() if text.get(key)]
    if model_type == "deepseek_v3" and text.get("num_nextn_predict_layers"):
        notes.append("the multi-token-prediction layer is left out, as transformers leaves it out")
    accepted = set(OTHER_KEYS.get(model_type, ()))
    for name, key in family.keys.items():
        if key != name and name in text and key not in text and name not in accepted and name in _PLAIN[:5]:
            notes.append(f"`{name}` has no effect on `{model_type}`, which reads `{key}`")
    return notes
