"""Full fine-tuning, LoRA and QLoRA of one model side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from memplan import gpus
from memplan.errors import MemplanError
from memplan.estimate import Estimate, ModelLike, estimate
from memplan.gpus import GpuSpec
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.runtime import device_for, runtime_for
from memplan.ops.device import Device
from memplan.residuals import band
from memplan.train_config import METHODS, NO_USE_FOR

Verdict = Literal["fits", "close", "does not fit"]


@dataclass(frozen=True, slots=True)
class Column:
    """One method. What is resident is told wherever the peak falls."""

    estimate: Estimate
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    """By card that was asked about, smallest first."""

    @property
    def weight_bytes(self) -> int:
        return self.estimate.bytes_of("weights")

    @property
    def adapter_resident_bytes(self) -> int:
        return self.estimate.bytes_of("adapters")

    @property
    def gradient_bytes(self) -> int:
        return self.estimate.bytes_of("gradients")

    @property
    def optimizer_state_bytes(self) -> int:
        return self.estimate.bytes_of("optimizer_states")

    @property
    def activation_bytes(self) -> int:
        """Saved activations and the loss's tensors alive at the peak."""
        parts = self.estimate.components
        return parts.get("activations", 0) + parts.get("loss", 0)

    def storage_bytes(self, num_variants: int) -> int:
        """Disk for `num_variants` fine-tuned models: each in full, or one base and an adapter for each.

        The base is kept in the dtype it is loaded in.
        """
        run = self.estimate
        if not run.config.trains_adapters:
            return num_variants * run.checkpoint_bytes
        return self.base_bytes + num_variants * run.adapter_bytes

    @property
    def base_bytes(self) -> int:
        """Size of the base model's files, unquantised."""
        return sum(w.numel * (w.loaded_dtype or w.dtype).itemsize for w in self.estimate.program.base_weights)


@dataclass(frozen=True, slots=True)
class Comparison:
    columns: tuple[Column, ...]
    num_variants: int
    gpus: tuple[GpuSpec, ...]
    """The cards asked about, smallest first."""


def compare(
    model: ModelLike,
    fields: Mapping[str, Any] | None = None,
    *,
    num_variants: int = 20,
    gpu: GpuSpec | str | None = None,
    allocator: AllocatorConfig | str | None = None,
) -> Comparison:
    """The three methods on one model.

    Args:
        model: as for `estimate`.
        fields: of TrainConfig, for all methods; those that a method has no use for are left out there.
        num_variants: fine-tuned models to store.
        gpu: decides the runtime's constants, and is asked about beside the common cards.
        allocator: PYTORCH_ALLOC_CONF.

    Raises:
        MemplanError: as `estimate`; `method` among the fields; fewer than one variant.
    """
    given = dict(fields or {})
    if "method" in given:
        raise MemplanError("`method` is what is compared", hints=["`memplan estimate` takes one"])
    if num_variants < 1:
        raise MemplanError(f"`variants` is a number of models to store, not {num_variants}")
    runs = []
    for method in METHODS:
        run = {name: value for name, value in given.items() if name not in NO_USE_FOR[method]}
        runs.append(estimate(model, run, gpu=gpu, allocator=allocator, method=method))
    asked = {row.name: row for row in map(gpus.get, gpus.COMMON)}
    if runs[0].gpu is not None:
        asked[runs[0].gpu.name] = runs[0].gpu
    cards = tuple(sorted(asked.values(), key=lambda row: row.memory_bytes))
    return Comparison(tuple(Column(run, verdicts(run, cards)) for run in runs), num_variants, cards)


def verdicts(run: Estimate, cards: Iterable[GpuSpec]) -> dict[str, Verdict]:
    """What to expect of `run` on each card, nothing else running on it.

    `close` lies between the process as it grows when nothing holds it back, with the band of measured residuals to
    spare, and its tensors alone: there the allocator's retries decide, which `memplan.fit` plays.
    """
    said: dict[str, Verdict] = {}
    for card, here, beside in played_on(run, cards):
        margin = band(here.config, here.tensor_bytes)
        if here.reserved_bytes + beside + margin <= card.memory_bytes:
            said[card.name] = "fits"
        else:
            said[card.name] = "does not fit" if here.tensor_bytes + beside - margin > card.memory_bytes else "close"
    return said


def played_on(run: Estimate, cards: Iterable[GpuSpec]) -> Iterator[tuple[GpuSpec, Estimate, int]]:
    """Each card, `run` as it plays on its kind of card, and the bytes that its process has there beside reserved
    memory."""
    played = {_kind(run.gpu): run}
    for card in cards:
        kind = _kind(card)
        if kind not in played:
            played[kind] = Estimate(run.model, run.config, card, run.allocator_config)
        here = played[kind]
        yield card, here, runtime_for(card).beside_reserved(run.config, here.program.managed_bytes)


def _kind(gpu: GpuSpec | None) -> tuple[Device, int]:
    """What of a card decides the sequence; cards of one kind share a play of it."""
    return replace(device_for(gpu), name=""), runtime_for(gpu).workspace_bytes
