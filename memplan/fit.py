"""Will it fit, and if not, which change makes it fit; if so, how much further can one go.

A run fits when the caching allocator, played with what the card has left beside context and kernels, never fails:
at the limit it gives cached blocks back to the driver and tries again, as PyTorch does before it raises out-of-memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, islice
from typing import Any, Literal

from memplan import catalog, gpus
from memplan.architectures import decoder_for
from memplan.changes import Fields, applicable, flags, replaced
from memplan.errors import MemplanError
from memplan.estimate import Estimate, ModelLike, make_config
from memplan.gpus import GpuSpec
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.runtime import runtime_for
from memplan.model_spec import ModelSpec
from memplan.residuals import band
from memplan.search import Border, last_not_negative
from memplan.train_config import TrainConfig

Verdict = Literal["fits", "too close to call", "does not fit"]
Knob = Literal["micro_batch_size", "seq_len", "rank"]
KNOBS: tuple[Knob, ...] = ("micro_batch_size", "seq_len", "rank")
_LIMITS: dict[str, int] = {"micro_batch_size": 2**16, "seq_len": 2**22, "rank": 2**14}
MAX_SUGGESTIONS = 5


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Changes that make the run fit."""

    flags: str
    """Options to add to the command."""
    fields: Fields
    process_bytes: int
    cost: str
    in_place_of: str = ""
    """Options that the user gave and that these replace."""


@dataclass(frozen=True)
class FitReport:
    """The answer for one run on one card; sizes in bytes."""

    estimate: Estimate
    gpu: GpuSpec
    verdict: Verdict
    capacity_bytes: int
    """What the card has for this process, and for what the driver keeps of it."""
    band_bytes: int
    """How far measured runs of this kind have gone beyond their prediction."""
    suggestions: tuple[Suggestion, ...]
    fitter: Fitter = field(repr=False)
    """What answers for this model and card."""

    @cached_property
    def largest(self) -> dict[str, int]:
        """When it fits: the largest value of each knob that still fits, each alone; sought when first asked for."""
        if not self.fits:
            return {}
        run = self.estimate.config
        return {knob: value for knob in KNOBS if (value := self.fitter.largest(run, knob))}

    @property
    def fits(self) -> bool:
        """True only for a plain `fits`: too close to call is not a yes."""
        return self.verdict == "fits"

    @property
    def process_bytes(self) -> int:
        return self.estimate.process_bytes

    @property
    def headroom_bytes(self) -> int:
        """Capacity less what the process takes where memory is not short; negative where it is."""
        return self.capacity_bytes - self.estimate.process_bytes


class Fitter:
    """Answers for one model and card; estimates are made once a config."""

    def __init__(self, model: ModelSpec, gpu: GpuSpec, allocator: AllocatorConfig, capacity_bytes: int) -> None:
        self.model = model
        self.gpu = gpu
        self.allocator = allocator
        self.capacity_bytes = capacity_bytes
        self._estimates: dict[TrainConfig, Estimate] = {}
        self._spares: dict[TrainConfig, int] = {}
        self._largest: dict[tuple[TrainConfig, Knob], int] = {}

    def estimate(self, config: TrainConfig) -> Estimate:
        made = self._estimates.get(config)
        if made is None:
            made = self._estimates[config] = Estimate(self.model, config, self.gpu, self.allocator)
        return made

    def verdict(self, config: TrainConfig) -> Verdict:
        if self.fits(config):
            return "fits"
        made = self.estimate(config)
        most = self._left(made) + band(made.config, made.tensor_bytes)
        return "too close to call" if made.spare_within(most) >= 0 else "does not fit"

    def fits(self, config: TrainConfig) -> bool:
        """Whether the run gets through with the band of measured residuals to spare."""
        return self._spare(config) >= 0

    def _spare(self, config: TrainConfig) -> int:
        """`Estimate.spare_within` what the card has, the band of measured residuals aside."""
        known = self._spares.get(config)
        if known is None:
            known = self._short_by_two_micro_steps(config)
        if known is None:
            made = self.estimate(config)
            left = self._left(made) - band(made.config, made.tensor_bytes)
            known = self._spares[config] = made.spare_within(left)
        return known

    def _short_by_two_micro_steps(self, config: TrainConfig) -> int | None:
        """What is missing where two micro-steps already hold more than there is: more of them hold no less."""
        if config.gradient_accumulation_steps <= 2 or config in self._estimates:
            return None
        made = self.estimate(config.but(gradient_accumulation_steps=2))
        left = self._left(made) - band(made.config, made.tensor_bytes)
        return left - made.tensor_bytes if made.tensor_bytes > left else None

    def room(self, made: Estimate) -> int:
        """What the card has for the process; less where `per_process_memory_fraction` allows it less."""
        limit_bytes = self.allocator.limit_bytes
        if limit_bytes is None:
            return self.capacity_bytes
        return min(self.capacity_bytes, limit_bytes + made.beside_reserved_bytes)

    def _left(self, made: Estimate) -> int:
        """What the driver has for the allocator."""
        return self.capacity_bytes - made.beside_reserved_bytes

    def largest(self, config: TrainConfig, knob: Knob) -> int:
        """The largest value of `knob` with which the run fits; 0 if none does.

        The tensors alone bound it from above, at a fifth of the price of a verdict; the verdict is then sought
        below that.
        """
        if knob == "rank" and not config.trains_adapters:
            return 0
        start: int = getattr(config, knob)

        def at(value: int) -> TrainConfig:
            return config if value == start else config.but(**{knob: value})

        def spare_of_tensors(value: int) -> int:
            made = self.estimate(at(value))
            return self._left(made) - made.tensor_bytes

        limit = _LIMITS[knob]
        if knob == "seq_len":
            limit = decoder_for(self.model, config).most_tokens or limit
        border = Border(lambda value: self._spare(at(value)), limit + 1)
        if config in self._spares and start <= limit:
            border.ask(start)
        if knob == "seq_len":
            border.ask_between(*self._lengths_alike(config))
        if border.bad <= limit:
            found = border.find([border.bad * part // 32 for part in (31, 30, 28, 24, 16)])
        else:
            most, border.bad = last_not_negative(spare_of_tensors, max(start, border.good), limit, tolerance=1 / 8)
            guesses = [most * part // 8 for part in (7, 6, 4)]
            found = border.find([limit, *guesses] if border.bad > limit else guesses)
        self._largest[config, knob] = found
        return found

    def _lengths_alike(self, config: TrainConfig) -> list[int]:
        """The lengths with as many tokens as the largest micro-batch that fits, and as one more: where attention keeps
        no tokens squared, the length ends between the two."""
        found = self._largest.get((config, "micro_batch_size"))
        if not found:
            return []
        tokens = config.seq_len * found // config.micro_batch_size
        return [tokens, tokens + config.seq_len // config.micro_batch_size]

    def suggestions(self, config: TrainConfig) -> Iterator[Suggestion]:
        """Single changes that make `config` fit, cheapest first; the best pairs where no single one does."""
        singles = list(applicable(config))
        found = False
        for change, fields in singles:
            made = self._try(config, fields)
            if made is not None:
                found = True
                yield _suggestion(config, fields, made, change.cost)
        if found:
            return
        for (first, a), (second, b) in combinations(singles, 2):
            if a.keys() & b.keys():
                continue
            made = self._try(config, a | b)
            if made is not None:
                yield _suggestion(config, a | b, made, f"{first.cost}; {second.cost}")

    def _try(self, config: TrainConfig, fields: Fields) -> Estimate | None:
        try:
            changed = config.but(**fields)
            return self.estimate(changed) if self.fits(changed) else None
        except ValueError:  # what the config or the model refuses is no suggestion (MemplanError is one)
            return None


def _suggestion(config: TrainConfig, fields: Fields, made: Estimate, cost: str) -> Suggestion:
    return Suggestion(flags(fields), fields, made.process_bytes, cost, flags(replaced(config, fields)))


def fit(
    model: ModelLike,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    gpu: GpuSpec | str = "auto",
    free_only: bool = False,
    allocator: AllocatorConfig | str | None = None,
    **fields: Any,
) -> FitReport:
    """Whether fine-tuning `model` fits on `gpu`, what to change if not, how far one can go if so.

    Args:
        gpu: a name, a size such as `24GiB`, or `auto` for the card of this machine.
        free_only: with `auto`, count only what is free now (a desktop or another job holds the rest).

    Raises:
        MemplanError: as `estimate`, for `auto` where there is no card, and for `free_only` with any other.
    """
    fitter, run = _fitter(model, config, gpu, free_only, allocator, fields)
    verdict = fitter.verdict(run)
    suggestions = () if verdict == "fits" else tuple(islice(fitter.suggestions(run), MAX_SUGGESTIONS))
    made = fitter.estimate(run)
    return FitReport(
        estimate=made,
        gpu=fitter.gpu,
        verdict=verdict,
        capacity_bytes=fitter.room(made),
        band_bytes=band(made.config, made.tensor_bytes),
        suggestions=suggestions,
        fitter=fitter,
    )


def solve(
    model: ModelLike,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    gpu: GpuSpec | str = "auto",
    for_: Knob = "micro_batch_size",
    allocator: AllocatorConfig | str | None = None,
    **fields: Any,
) -> int:
    """The largest `for_` with which the run fits on `gpu`; 0 if none does.

    Raises:
        MemplanError: as `fit`, and for a knob that cannot be solved for.
    """
    if for_ not in KNOBS:
        raise MemplanError(f"cannot solve for `{for_}`", hints=["solve for " + ", ".join(f"`{k}`" for k in KNOBS)])
    fitter, run = _fitter(model, config, gpu, False, allocator, fields)
    return fitter.largest(run, for_)


def over_cards(
    model: ModelLike,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    allocator: AllocatorConfig | str | None = None,
    **fields: Any,
) -> list[FitReport]:
    """The verdict on each of the common cards (`gpus.COMMON`), without suggestions.

    Raises:
        MemplanError: as `estimate`.
    """
    reports = []
    for name in gpus.COMMON:
        fitter, run = _fitter(model, config, name, False, allocator, fields)
        made = fitter.estimate(run)
        verdict, margin = fitter.verdict(run), band(made.config, made.tensor_bytes)
        reports.append(FitReport(made, fitter.gpu, verdict, fitter.room(made), margin, (), fitter))
    return reports


def _fitter(
    model: ModelLike,
    config: TrainConfig | Mapping[str, Any] | None,
    gpu: GpuSpec | str,
    free_only: bool,
    allocator: AllocatorConfig | str | None,
    fields: Mapping[str, Any],
) -> tuple[Fitter, TrainConfig]:
    spec, decided = catalog.load_with_settings(model)
    run = make_config(config, decided=decided, **fields)
    if isinstance(gpu, str) and gpu.strip().lower() == "auto":
        found = gpus.detect()
        card, capacity = found.spec, found.total_bytes
        if free_only:  # of what NVML calls used, a run's need has the driver's own part as well
            capacity = min(found.free_bytes + runtime_for(card).driver_bytes, capacity)
    elif free_only:
        raise MemplanError("what is free is known of the card of this machine alone", hints=["use `--gpu auto`"])
    else:
        card = gpus.get(gpu) if isinstance(gpu, str) else gpu
        capacity = card.memory_bytes
    settings = allocator or AllocatorConfig()
    if isinstance(settings, str):
        settings = AllocatorConfig.parse(settings, device_bytes=card.memory_bytes)
    return Fitter(spec, card, settings, capacity), run
