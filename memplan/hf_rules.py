"""What the config classes derive when they are made: head widths, sliding layers, rotary parts, quirks.

Each function completes `fields` (ModelSpec's) from `config` (the family's keys, class defaults filled in) and
follows `__post_init__` of the family's class in transformers 5.17, or the modeling code where that decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.errors import InvalidSpecError
from memplan.hf_families import Family

MAX_LAYERS = 2**12


def _whole(fields: Mapping[str, Any], name: str) -> int:
    """A size that other sizes are derived from, before ModelSpec checks the rest."""
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise InvalidSpecError(f"`{name}` must be a whole number above zero, not {value!r:.60}")
    return value


def fill_widths(fields: dict[str, Any], config: Mapping[str, Any], family: Family) -> None:
    hidden, heads = _whole(fields, "hidden_size"), _whole(fields, "num_attention_heads")
    if fields.get("num_key_value_heads") is None:
        fields["num_key_value_heads"] = heads
    if fields.get("intermediate_size") is None:
        fields["intermediate_size"] = 4 * hidden
    head_dim = None if family.derives_head_dim else config.get("head_dim")
    if head_dim is None:
        if hidden % heads:
            hints = [] if family.derives_head_dim else ["give `head_dim` if the heads are of another width"]
            raise InvalidSpecError(
                f"`hidden_size` ({hidden}) is not a multiple of `num_attention_heads` ({heads})", hints=hints
            )
        head_dim = hidden // heads
    fields["head_dim"] = head_dim


def fill_sliding(fields: dict[str, Any], config: Mapping[str, Any], family: Family) -> None:
    num_layers = _whole(fields, "num_hidden_layers")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    types = config.get("layer_types") if family.sliding not in ("none", "every") else None
    if types is None and family.sliding == "linear":
        types = _linear_layers(config, num_layers)
    if types is None and family.sliding == "chunked":
        rotates = _no_rope_layers(config, num_layers)
        types = ["chunked_attention" if flag else "full_attention" for flag in rotates][:num_layers]
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
    if isinstance(flags, list | tuple) and flags:
        return list(flags)
    interval = config.get("no_rope_layer_interval")
    if type(interval) is not int or interval < 1:
        raise InvalidSpecError("`no_rope_layer_interval` is not a whole number above zero")
    return [int((i + 1) % interval != 0) for i in range(min(num_layers, MAX_LAYERS))]


def _linear_layers(config: Mapping[str, Any], num_layers: int) -> list[str]:
    interval = config.get("full_attention_interval", 4)
    if type(interval) is not int or interval < 1:
        raise InvalidSpecError("`full_attention_interval` is not a whole number above zero")
    return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(min(num_layers, MAX_LAYERS))]


def fill_rotary(fields: dict[str, Any], config: Mapping[str, Any], family: Family) -> None:
    """`rotary_dim` = int(head_dim · partial_rotary_factor), as the rotary modules compute it."""
    if family.rotary_factor is None:
        return
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    for key in family.rotary_factor_keys:
        factor = config.get(key) if factor is None else factor
    factor = family.rotary_factor if factor is None else factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise InvalidSpecError(f"`{family.rotary_factor_keys[0]}` must be above 0 and at most 1, not {factor!r:.60}")
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


def _llama4(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    num_layers = fields["num_hidden_layers"]
    fields["no_rope_layers"] = tuple(_no_rope_layers(config, num_layers)[:num_layers])
    fields["attn_temperature_tuning"] = bool(fields["attn_temperature_tuning"])  # 4 in the first configs
    _whole(fields, "attention_chunk_size")  # the mask of chunks is made whether a layer has it or not
    fields["output_router_logits"] = False  # recorded, but no loss is made of them
    if any(kind not in ("chunked_attention", "full_attention") for kind in fields["layer_types"]):
        raise InvalidSpecError("`layer_types` of `llama4_text` are `chunked_attention` and `full_attention`")
    layers, sparse = range(min(num_layers, MAX_LAYERS)), config.get("moe_layers")
    step = config.get("interleave_moe_layer_step") if sparse is None else 1
    if type(step) is not int or step < 1:
        raise InvalidSpecError("`interleave_moe_layer_step` is not a whole number above zero")
    if sparse is None:
        sparse = range(step - 1, num_layers, step)
    elif isinstance(sparse, list | tuple):
        fields["mlp_only_layers"] = tuple(i for i in layers if i not in sparse)
    else:
        raise InvalidSpecError("`moe_layers` is not a list")
    if any(i in sparse for i in layers):
        _whole(fields, "num_experts")
        fields |= {"decoder_sparse_step": step, "shared_expert_intermediate_size": fields["moe_intermediate_size"]}
    else:
        fields |= {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}


def _exaone4(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Where there is a window, layers with full attention do not rotate ("global NoPE for hybrid attention model")."""
    if config.get("sliding_window") is not None:
        kinds = fields["layer_types"] or ("full_attention",) * fields["num_hidden_layers"]
        fields["no_rope_layers"] = tuple(int(kind == "sliding_attention") for kind in kinds)


def _gptj(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    rotary = config.get("rotary_dim")
    fields["rotary_dim"] = rotary if rotary != fields["head_dim"] else None


def _deepseek(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    fields["head_dim"] = fields["qk_rope_head_dim"]
    _shared_experts(fields, config)


def _shared_experts(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Experts that every token visits are built as one MLP of their joint width."""
    shared, width = fields["num_shared_experts"], fields["moe_intermediate_size"]
    if type(shared) is int and type(width) is int:
        fields["shared_expert_intermediate_size"] = shared * width


_SPARSE_LAYERS, _SPARSITY = 10, 0.95
"""Layers that are sparse where the config does not say which, if there are more of them, and by how much (transformers
5.17 configuration_gemma3n.py)."""


def _gemma3n(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    num_layers = _whole(fields, "num_hidden_layers")
    if "sliding_attention" not in fields["layer_types"]:
        fields["layer_types"] = ()
    fields["sliding_window"] = config.get("sliding_window")  # its mask is made whether a layer slides or not
    widths = fields["intermediate_size"]
    if isinstance(widths, list | tuple):
        _one_a_layer("intermediate_size", widths, num_layers)
        fields["intermediate_size"] = widths[0]
        if any(width != widths[0] for width in widths):
            fields["intermediate_sizes"] = tuple(widths)
    pattern = config.get("activation_sparsity_pattern")
    if pattern is None:
        num_sparse = _SPARSE_LAYERS if num_layers > _SPARSE_LAYERS else 0
        pattern = [_SPARSITY] * num_sparse + [0.0] * (min(num_layers, MAX_LAYERS) - num_sparse)
    _one_a_layer("activation_sparsity_pattern", pattern, num_layers)
    fields["activation_sparsity_pattern"] = tuple(pattern)


def _one_a_layer(name: str, values: Any, num_layers: int) -> None:
    if not isinstance(values, list | tuple):
        raise InvalidSpecError(f"`{name}` is not a list")
    if len(values) != num_layers:
        raise InvalidSpecError(f"`{name}` has {len(values)} entries for {num_layers} layers")


_GLOBAL_HEAD_DIM = 512
"""`global_head_dim` where the config does not say (transformers 5.17 configuration_gemma4.py)."""


def _gemma4(fields: dict[str, Any], config: Mapping[str, Any]) -> None:
    if fields["layer_types"]:  # "Forcing last layer to `full_attention`"
        fields["layer_types"] = (*fields["layer_types"][:-1], "full_attention")
    if "sliding_attention" not in fields["layer_types"]:
        fields["layer_types"] = ()
    fields["sliding_window"] = config.get("sliding_window")  # its mask is made whether a layer slides or not
    told = _full_layers(fields, config)
    fields["global_head_dim"] = told.get("head_dim", fields["head_dim"])
    fields["num_global_key_value_heads"] = told.get("num_key_value_heads")
    if not config.get("enable_moe_block"):
        fields |= {"num_experts": 0, "num_experts_per_tok": 0, "moe_intermediate_size": 0}
    else:
        fields["moe_intermediate_size"] = fields["moe_intermediate_size"] or 0


def _full_layers(fields: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What the layers with full attention have of their own: by keys of the published configs, or by the
    `per_layer_config` that transformers 5.17 writes in their place."""
    by_layer = config.get("per_layer_config")
    if by_layer is None:
        heads = config.get("num_global_key_value_heads") if fields["attention_k_eq_v"] else None
        told = {"head_dim": config.get("global_head_dim", _GLOBAL_HEAD_DIM)}
        return told if heads is None else told | {"num_key_value_heads": heads}
    types = fields["layer_types"] or ("full_attention",) * fields["num_hidden_layers"]
    full = {str(i) for i, kind in enumerate(types) if kind == "full_attention"}
    if by_layer == {}:
        return {}
    changes = list(by_layer.values()) if isinstance(by_layer, Mapping) and set(by_layer) == full else [None]
    first = changes[0]
    known = isinstance(first, Mapping) and set(first) <= {"head_dim", "num_key_value_heads"}
    if not isinstance(first, Mapping) or not known or any(change != first for change in changes):
        raise InvalidSpecError(
            "`per_layer_config` tells of more than the heads of all layers with full attention, which memplan cannot "
            "follow"
        )
    return dict(first)


FAMILY_RULES = {
    "falcon": _falcon,
    "opt": _opt,
    "mpt": _mpt,
    "smollm3": _smollm3,
    "exaone4": _exaone4,
    "gemma3n_text": _gemma3n,
    "llama4_text": _llama4,
    "gemma4_text": _gemma4,
    "gemma4_unified_text": _gemma4,
    "gptj": _gptj,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "glm4_moe": _shared_experts,
}
