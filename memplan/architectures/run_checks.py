"""Runs that a family's classes refuse, or that memplan does not know how to play."""

from __future__ import annotations

from memplan.errors import InvalidSpecError, MemplanError
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

WITHOUT_FLASH = frozenset({"bloom", "llama4_text", "mpt"})
"""Model types whose class leaves `_supports_flash_attn` off (transformers 5.17); all others set it."""


def check_run(spec: ModelSpec, config: TrainConfig, *, supports_sdpa: bool) -> None:
    """transformers 5.17 modeling_utils.py `_flash_attn_can_dispatch`.

    sdpa, where the family has none, is what everybody asks for who says nothing: eager runs, with a warning.

    Raises:
        MemplanError: flash attention or a loss that the family has not, or not here; flash attention in fp32.
    """
    asked, model_type = config.attention, spec.model_type
    if config.loss == "liger" and model_type == "granite":  # liger_kernel 0.8.5 apply_liger_kernel_to_granite raises
        raise MemplanError("Liger has no fused loss for `granite`, and refuses it", hints=["take `loss=full`"])
    hints = ["take `attention=eager`, or leave `attention` out"]
    if asked != "flash_attention_2":
        return
    if model_type in WITHOUT_FLASH:
        raise MemplanError(f"transformers has no flash attention for `{model_type}`, and refuses it", hints=hints)
    if not supports_sdpa:
        raise MemplanError(f"memplan does not know flash attention of `{model_type}`", hints=hints)
    if config.weight_dtype == "fp32" and not config.autocast:
        raise MemplanError(
            "flash attention takes no fp32", hints=["turn `autocast` on, load the weights in bf16, or take `sdpa`"]
        )


def check_rotary(spec: ModelSpec, width: int | None) -> None:
    """Rotation turns pairs: transformers' tables have an even width, which does not meet an odd one.

    Raises:
        InvalidSpecError: `width`, how much of a head is rotated, is odd.
    """
    if width is not None and width % 2:
        raise InvalidSpecError(
            f"rotary embeddings turn pairs: {width} elements of each head (`head_dim` {spec.head_dim}) are none",
            hints=["`hidden_size`, `num_attention_heads`, `head_dim` and `partial_rotary_factor` decide it"],
        )
