"""What can be changed about a run to make it smaller: one row each, with what it costs in time or quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from memplan.train_config import LOSSES, TrainConfig

Fields = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one thing; `fields` gives the new values of a config, or None where it does not apply."""

    name: str
    cost: str
    """What it costs, in words."""
    fields: Callable[[TrainConfig], Fields | None]


def _checkpointing(c: TrainConfig) -> Fields | None:
    return None if c.gradient_checkpointing else {"gradient_checkpointing": True}


def _sdpa(c: TrainConfig) -> Fields | None:
    return {"attention": "sdpa"} if c.attention == "eager" else None


def _chunked(c: TrainConfig) -> Fields | None:
    return {"loss": "chunked"} if c.loss == "full" and "chunked" in LOSSES[c.stack] else None


def _liger(c: TrainConfig) -> Fields | None:
    return {"loss": "liger"} if c.loss == "full" and "liger" in LOSSES[c.stack] else None


def _fused(c: TrainConfig) -> Fields | None:
    return {"optimizer": "adamw_torch_fused"} if c.optimizer in ("adamw_torch", "adamw_torch_forloop") else None


def _eight_bit(c: TrainConfig) -> Fields | None:
    return {"optimizer": "adamw_bnb_8bit"} if c.optimizer.startswith("adamw_torch") else None


def _paged(c: TrainConfig) -> Fields | None:
    return {"optimizer": "paged_adamw_8bit"} if c.optimizer.startswith("adamw") else None


def _half_batch(c: TrainConfig) -> Fields | None:
    if c.micro_batch_size % 2:
        return None
    return {
        "micro_batch_size": c.micro_batch_size // 2,
        "gradient_accumulation_steps": c.gradient_accumulation_steps * 2,
    }


def _batch_of_one(c: TrainConfig) -> Fields | None:
    if c.micro_batch_size <= 2:
        return None
    steps = c.gradient_accumulation_steps * c.micro_batch_size
    return {"micro_batch_size": 1, "gradient_accumulation_steps": steps}


def _half_length(c: TrainConfig) -> Fields | None:
    return {"seq_len": c.seq_len // 2} if c.seq_len >= 512 else None


def _quarter_rank(c: TrainConfig) -> Fields | None:
    return {"rank": max(c.rank // 4, 4)} if c.rank is not None and c.rank > 16 else None


def _query_value(c: TrainConfig) -> Fields | None:
    return {"target_modules": ("q_proj", "v_proj")} if c.target_modules == "all-linear" and c.trains_adapters else None


def _pure_bf16(c: TrainConfig) -> Fields | None:
    if c.method != "full" or c.weight_dtype != "fp32":
        return None
    # autocast goes with fp32 weights; to one who asked for it, it stays
    return {"weight_dtype": "bf16"} if "autocast" in c.model_fields_set else {"weight_dtype": "bf16", "autocast": False}


def _lora(c: TrainConfig) -> Fields | None:
    return {"method": "lora"} if c.method == "full" else None


def _qlora(c: TrainConfig) -> Fields | None:
    return {"method": "qlora"} if c.method != "qlora" else None


CHANGES: tuple[Change, ...] = (
    Change("sdpa", "none: the same attention by a fused kernel", _sdpa),
    Change("fused optimizer", "none: the same update in one kernel", _fused),
    Change("chunked loss", "none in quality; logits are made in pieces", _chunked),
    Change("liger loss", "none in quality; needs liger-kernel", _liger),
    Change("checkpointing", "time: each layer's forward runs twice, about a third more", _checkpointing),
    Change("half the micro-batch", "time: smaller kernels; the global batch stays", _half_batch),
    Change("micro-batch 1", "time: smaller kernels; the global batch stays", _batch_of_one),
    Change("8-bit optimizer", "quality: states in 8 bit, little noticed in practice; needs bitsandbytes", _eight_bit),
    Change("paged optimizer", "time: states move between host and GPU; needs bitsandbytes", _paged),
    Change("bf16 weights", "quality: no fp32 master weights, small updates can be lost", _pure_bf16),
    Change("lower rank", "quality: adapters of a quarter of the rank", _quarter_rank),
    Change("fewer targets", "quality: adapters on q and v only", _query_value),
    Change("half the length", "quality: longer samples are cut", _half_length),
    Change("LoRA", "quality: adapters instead of every weight", _lora),
    Change("QLoRA", "quality: a 4-bit base; time: weights are dequantised in every pass", _qlora),
)
"""Cheapest first: what costs nothing, then time, then quality."""


def applicable(config: TrainConfig) -> Iterator[tuple[Change, Fields]]:
    """The changes that mean something for `config`, cheapest first; a switch that its user set is left alone."""
    for change in CHANGES:
        fields = change.fields(config)
        if fields is not None and not any(isinstance(value, bool) for value in replaced(config, fields).values()):
            yield change, fields


def replaced(config: TrainConfig, fields: Fields) -> Fields:
    """What the user of `config` said and `fields` would change."""
    return {name: getattr(config, name) for name in fields if name in config.model_fields_set}


def flags(fields: Fields) -> str:
    """`fields` as the options of the command line."""
    return " ".join(_flag(name, value) for name, value in fields.items())


def _flag(name: str, value: Any) -> str:
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return option if value else "--no-" + name.replace("_", "-")
    if isinstance(value, tuple):
        value = ",".join(value)
    return f"{option} {value}"
