"""What PEFT 0.21.2 adapts, told by names: plain linear layers, and the fused experts of transformers 5.

utils/transformers_weight_conversion.py `_convert_peft_config_moe` turns the names that an architecture's layers had
in transformers 4 into parameters: experts' projections into `gate_up_proj` (of rank 2r, since it holds two) and
`down_proj`, the router into `gate.weight`. It knows the families below; in others (qwen2_moe, gpt_oss) experts and
router stay as they are. The names leave `target_modules` everywhere, so that dense layers and shared experts whose
projections have the same names are not adapted either.
"""

from __future__ import annotations

from typing import Literal

from memplan.errors import MemplanError

Targets = Literal["all-linear"] | tuple[str, ...]

_GATED = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_CONVERTED: dict[str, dict[str, str]] = {
    "mixtral": _MIXTRAL,
    "qwen3_moe": _GATED,
    "qwen3_next": _GATED,
    "olmoe": _GATED,
    "deepseek_v2": _GATED,
    "deepseek_v3": _GATED,
    "glm4_moe": _GATED,
}
_FUSED = "gate_up_proj"


def converts_experts(model_type: str) -> bool:
    """Whether PEFT knows the fused experts of that family."""
    return model_type in _CONVERTED


def converted_names(model_type: str) -> tuple[str, ...]:
    """Names that PEFT takes for parts of that family's experts and router."""
    return tuple(_CONVERTED.get(model_type, {}))


def adapts_module(model_type: str, targets: Targets, name: str) -> bool:
    """Whether the linear layer `name` gets an adapter (tuners/tuners_utils.py `check_target_module_exists`)."""
    converted = _CONVERTED.get(model_type, {})
    if targets == "all-linear":
        return not name.startswith("lm_head") and name.rpartition(".")[2] not in converted
    kept = [t for t in targets if t.rpartition(".")[2] not in converted]
    return any(is_named(name, t) for t in kept)


def is_named(name: str, wanted: str) -> bool:
    """Whether the module or parameter `name` ends with the whole names in `wanted`."""
    return name == wanted or name.endswith("." + wanted)


def parameter_rank(model_type: str, targets: Targets, name: str, rank: int) -> int:
    """Rank of the adapter on the bare parameter `name`; 0 for none.

    Raises:
        MemplanError: one of two projections that are fused, which PEFT refuses.
    """
    converted = _CONVERTED.get(model_type, {})
    if not converted:
        return 0
    old_names = set(converted) if targets == "all-linear" else {t.rpartition(".")[2] for t in targets} & set(converted)
    for new_name in {converted[old] for old in old_names}:
        if not is_named(name, new_name):
            continue
        if new_name != _FUSED:
            return rank
        missing = {old for old, new in converted.items() if new == _FUSED} - old_names
        if missing:
            raise MemplanError(
                f"PEFT cannot adapt a part of the fused `{_FUSED}`: `target_modules` lacks `{sorted(missing)[0]}`",
                hints=[f"for `{model_type}` name both projections that are fused into it, or none"],
            )
        return 2 * rank
    return 0
