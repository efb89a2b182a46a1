"""Checkpoints that come quantised: what their `quantization_config` decides of a run.

transformers loads such a base as it is stored, whatever the user asks for (quantizers/auto.py
`merge_quantization_configs`, 5.17). bitsandbytes' storage is a run of `method="qlora"`. fp8 and mxfp4 are
not trainable (`is_trainable` of their quantizers) and are dequantised when they are loaded. Others are not modelled.
"""

from __future__ import annotations

from typing import Any

from memplan.errors import MemplanError
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

_DEQUANTISED = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
}
"""`quant_method` and what loads it as plain weights."""


def storage_fields(spec: ModelSpec) -> dict[str, Any]:
    """TrainConfig's fields that the storage of the checkpoint decides; none for one that is not quantised.

    Raises:
        MemplanError: a `quant_method` that memplan does not model, or experts that it makes modules of their own
            (transformers 5.17 quantizers/base.py `MODULES_TO_PATCH_FOR_QUANTIZATION`).
    """
    stored = spec.quantization_config
    if not stored:
        return {}
    method = _quant_method(stored)
    if method in _DEQUANTISED:
        return {}
    if method != "bitsandbytes":
        known = ["bitsandbytes", *_DEQUANTISED]
        raise MemplanError(
            f"`{spec.label}` comes quantised by `{method}`, which is not modelled (known: {', '.join(known)})",
            hints=["name the model it was quantised from: `--method qlora` quantises it with bitsandbytes"],
        )
    if spec.model_type == "llama4_text" and spec.is_moe:
        raise MemplanError(
            f"`{spec.label}` comes quantised by bitsandbytes, experts included, which transformers then runs one "
            "by one (`SequentialLlama4TextExperts`): not modelled",
            hints=["name the model it was quantised from: `--method qlora` quantises all but its experts"],
        )
    if stored.get("load_in_8bit") or stored.get("_load_in_8bit"):
        return {"method": "qlora", "quant_type": "int8"}
    # BitsAndBytesConfig's own defaults where its keys are missing.
    return {
        "method": "qlora",
        "quant_type": stored.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": bool(stored.get("bnb_4bit_use_double_quant", False)),
    }


def _quant_method(stored: dict[str, Any]) -> str:
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "bitsandbytes"
    return str(stored.get("quant_method", "an unnamed method")).lower()


def check_storage(spec: ModelSpec, config: TrainConfig) -> None:
    """Refuses a run that loads the checkpoint otherwise than it is stored.

    Raises:
        MemplanError: a field of `config` contradicts the storage, or its method is not modelled.
    """
    fields = storage_fields(spec)
    for name, value in fields.items():
        asked = getattr(config, name)
        if asked != value:
            raise MemplanError(
                f"`{spec.label}` comes quantised ({told(fields)}), and transformers loads it so: "
                f"`{name}={asked}` cannot be had",
                hints=["ask for method `qlora` alone, or name the model that was quantised"],
            )


def told(fields: dict[str, Any]) -> str:
    """`storage_fields` in words."""
    double = {True: ", double quantisation", False: ", no double quantisation", None: ""}
    return f"{fields['quant_type']}{double[fields.get('double_quant')]}"


def storage_warnings(spec: ModelSpec, config: TrainConfig) -> list[str]:
    """What the user of a checkpoint in fp8 or mxfp4 should know."""
    stored = spec.quantization_config
    loader = _DEQUANTISED.get(_quant_method(stored)) if stored else None
    if not stored or loader is None:
        return []
    text = (
        f"the checkpoint is stored in {_quant_method(stored)}, which transformers cannot train: "
        f"estimated as loaded in {config.weight_dtype} (`{loader}`)"
    )
    if config.method == "qlora":
        text += "; bitsandbytes takes it only once it is saved so, not straight from the checkpoint"
    return [text]
