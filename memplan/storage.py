"""What it takes to keep N fine-tuned variants of a model: a full copy each, or one base and an adapter each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memplan.compare import Column
from memplan.errors import MemplanError
from memplan.estimate import Estimate, ModelLike, estimate, make_config
from memplan.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of tensors on disk (safetensors; its header takes some kilobytes more)."""

    num_variants: int
    base_bytes: int
    """One copy of the model in the dtype it is loaded in."""
    adapter_bytes: int
    """One saved adapter."""

    @property
    def full_copies_bytes(self) -> int:
        return self.num_variants * self.base_bytes

    @property
    def adapters_bytes(self) -> int:
        """The base once and an adapter for each variant."""
        return self.base_bytes + self.num_variants * self.adapter_bytes


def storage(
    model: ModelLike, config: TrainConfig | Mapping[str, Any] | None = None, *, num_variants: int, **fields: Any
) -> Storage:
    """What `num_variants` variants take; adapters are those of `config`, or LoRA's of rank 16 for a full fine-tune.

    Raises:
        MemplanError: an unknown model, fields that make no run, or a number of variants that is not above zero.
    """
    run = make_config(config, **fields)
    if not run.trains_adapters:
        run = make_config(method="lora", stack=run.stack, seq_len=run.seq_len)
    return storage_of(estimate(model, run), num_variants)


def storage_of(result: Estimate, num_variants: int) -> Storage:
    """The same for an estimate of a run that trains adapters; full copies are in the dtype the base is loaded in.

    Raises:
        MemplanError: a number of variants that is not above zero.
    """
    if num_variants <= 0:
        raise MemplanError(f"num_variants must be above zero, not {num_variants}")
    return Storage(num_variants, Column(result).base_bytes, result.adapter_bytes)
