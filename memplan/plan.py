"""`plan`: the best ways to train on a given number of tokens, over methods, GPUs, micro-batches and checkpointing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memplan import catalog, gpus
from memplan.cost import PriceSource, check_provider, price_of, price_table
from memplan.errors import MemplanError, UnknownNameError
from memplan.estimate import ModelLike, make_config
from memplan.garbage import collector_paused
from memplan.gpus import GpuSpec
from memplan.plan_search import Candidate, Lane, Search
from memplan.prices import Kind, Price
from memplan.timing.roofline import shipped
from memplan.train_config import METHODS, NO_USE_FOR, Method, TrainConfig
from memplan.units import dollars_text, hours_text

TOTAL_BATCH_SIZE = 16
"""Sequences per optimizer step unless told: all rows of a plan train alike."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A method on a GPU that is not on the front, and why."""

    gpu: str
    method: Method
    reason: str
    candidate: Candidate | None = None
    """Its best run, if one may fit."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The front of dollars against hours, cheapest first, and what was left out."""

    model: str
    num_tokens: int
    total_batch_size: int
    front: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    best: dict[str, Candidate] = field(hash=False)
    """The cheapest run of each method that fits somewhere."""
    num_configurations: int
    """Runs that were looked at."""
    num_played: int
    """Runs that were played on the allocator; the others were ruled out before."""
    assumptions: tuple[str, ...]

    @property
    def cheapest(self) -> Candidate | None:
        return self.front[0] if self.front else None

    @property
    def fastest(self) -> Candidate | None:
        return self.front[-1] if self.front else None

    @property
    def recommended(self) -> Candidate | None:
        """The least product of dollars and hours: twice the price has to buy half the time."""
        return min(self.front, key=lambda c: ((c.dollars or 0.0) * c.hours, c.hours), default=None)


def plan(
    model: ModelLike,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    num_tokens: int,
    methods: Sequence[Method] = METHODS,
    gpu_names: Sequence[str] | None = None,
    total_batch_size: int = TOTAL_BATCH_SIZE,
    max_usd: float | None = None,
    max_hours: float | None = None,
    price: float | None = None,
    price_rows: PriceSource | None = None,
    provider: str | None = None,
    kind: Kind | None = "on-demand",
    **fields: Any,
) -> Plan:
    """The Pareto front of dollars against hours for training `model` on `num_tokens` tokens.

    `config` or `fields` say what all runs share; a field that a method has no use for applies to the others. A
    micro-batch size or checkpointing that is given is kept, otherwise both are searched. `gpu_names` are those with a
    price unless told. One GPU a run.

    Raises:
        MemplanError: an unknown model, GPU, method or provider, an amount or limit that is not above zero, one price
            for several GPUs, or fields that make no run.
    """
    spec, decided = catalog.load_with_settings(model)
    said = {name: value for name, value in decided.items() if name != "method"}
    said.update(config.model_dump(include=config.model_fields_set) if isinstance(config, TrainConfig) else config or {})
    said.update(fields)
    for name, value in (("num_tokens", num_tokens), ("max_usd", max_usd), ("max_hours", max_hours)):
        if value is not None and not value > 0:
            raise MemplanError(f"{name} must be above zero, not {value:g}")
    table = price_table(price_rows)
    check_provider(provider, table)
    cards = _cards(gpu_names, table, provider, kind)
    if price is not None and len(cards) > 1:
        raise MemplanError("one price for several GPUs", hints=["name one with --gpus, or give --prices file.csv"])
    runs = runs_of(said, methods, total_batch_size)
    limits = _Limits(max_usd, max_hours)
    search = Search(spec, runs, num_tokens, cards)
    lanes = []
    with collector_paused():
        for card in cards:
            paid, _ = price_of(card, price=price, rows=table, provider=provider, kind=kind)
            lanes += [search.lane(card, method, paid) for method in runs]
        while open_ := [lane for lane in _wanted(lanes, limits) if lane.candidate and not lane.candidate.fits]:
            search.settle(open_)
    front = _front(lanes, limits)
    return Plan(
        model=spec.label,
        num_tokens=num_tokens,
        total_batch_size=total_batch_size,
        front=tuple(front),
        rejected=tuple(_rejected(lanes, front, limits)),
        best={lane.method: lane.candidate for lane in reversed(_best_lanes(lanes, limits)) if lane.candidate},
        num_configurations=search.num_configurations,
        num_played=search.num_played,
        assumptions=tuple(_assumptions(front)),
    )


def _cards(
    names: Sequence[str] | None, table: Iterable[Price], provider: str | None, kind: Kind | None
) -> list[GpuSpec]:
    if names is None:
        offered = {row.gpu for row in table if provider in (None, row.provider) and kind in (None, row.kind)}
        names = [name for name in gpus.names() if name in offered]
    cards = {card.name: card for card in map(gpus.get, names)}
    if not cards:
        raise MemplanError("no GPU to choose from", hints=["name some with --gpus rtx-4090,h100-sxm"])
    return list(cards.values())


def runs_of(
    said: Mapping[str, Any], methods: Sequence[Method], total_batch_size: int
) -> dict[Method, list[TrainConfig]]:
    """The runs of each method, by checkpointing and ascending micro-batch.

    Raises:
        MemplanError: an unknown method, a batch that cannot be split, or fields that make no run.
    """
    for method in methods:
        if method not in METHODS:
            raise UnknownNameError("method", method, METHODS)
    if not methods:
        raise MemplanError("no method to choose from", hints=["known: " + ", ".join(METHODS)])
    if total_batch_size <= 0:
        raise MemplanError(f"total_batch_size must be above zero, not {total_batch_size}")
    if "gradient_accumulation_steps" in said:
        raise MemplanError(
            "`gradient_accumulation_steps` follows from the total batch and the micro-batch",
            hints=[f"give --total-batch-size: sequences per optimizer step, {TOTAL_BATCH_SIZE} unless told"],
        )
    sizes = [said["micro_batch_size"]] if "micro_batch_size" in said else _powers_of_two(total_batch_size)
    if sizes[0] > 0 and total_batch_size % sizes[0]:
        raise MemplanError(
            f"a total batch of {total_batch_size} sequences is no multiple of a micro-batch of {sizes[0]}",
            hints=["choose --total-batch-size so that it is"],
        )
    checkpointing = [said["gradient_checkpointing"]] if "gradient_checkpointing" in said else [False, True]
    runs: dict[Method, list[TrainConfig]] = {}
    for method in dict.fromkeys(methods):
        shared = {name: value for name, value in said.items() if name not in NO_USE_FOR[method]} | {"method": method}
        runs[method] = [
            make_config(
                shared,
                gradient_checkpointing=saves,
                micro_batch_size=size,
                gradient_accumulation_steps=max(1, total_batch_size // max(size, 1)),
            )
            for saves in checkpointing
            for size in sizes
        ]
    return runs


def _powers_of_two(total: int) -> list[int]:
    """1, 2, 4 … as long as they divide `total`."""
    sizes = [1]
    while total % (2 * sizes[-1]) == 0:
        sizes.append(2 * sizes[-1])
    return sizes


@dataclass(frozen=True, slots=True)
class _Limits:
    max_usd: float | None
    max_hours: float | None

    def over(self, c: Candidate) -> str | None:
        """Why `c` is out of bounds; None if it is not."""
        if c.dollars is None:
            return "no price"
        if self.max_usd is not None and c.dollars > self.max_usd:
            return f"{dollars_text(c.dollars)} at best, over --max-usd {self.max_usd:g}"
        if self.max_hours is not None and c.hours > self.max_hours:
            return f"{hours_text(c.hours)} at best, over --max-hours {self.max_hours:g}"
        return None


def _allowed(lanes: Iterable[Lane], limits: _Limits) -> list[Lane]:
    """Lanes within the limits, cheapest first; ties go to the faster, then by name."""
    inside = [lane for lane in lanes if lane.candidate is not None and limits.over(lane.candidate) is None]
    return sorted(inside, key=lambda lane: _order(lane.candidate))


def _order(c: Candidate | None) -> tuple[float, float, str, str]:
    assert c is not None
    assert c.dollars is not None
    return c.dollars, c.hours, c.gpu, c.method


def _front_lanes(lanes: Iterable[Lane], limits: _Limits) -> list[Lane]:
    front: list[Lane] = []
    fastest = float("inf")
    for lane in _allowed(lanes, limits):
        assert lane.candidate is not None
        if lane.candidate.hours < fastest:
            front.append(lane)
            fastest = lane.candidate.hours
    return front


def _front(lanes: Iterable[Lane], limits: _Limits) -> list[Candidate]:
    return [lane.candidate for lane in _front_lanes(lanes, limits) if lane.candidate is not None]


def _best_lanes(lanes: Iterable[Lane], limits: _Limits) -> list[Lane]:
    """The cheapest lane of each method, cheapest first."""
    best: dict[Method, Lane] = {}
    for lane in _allowed(lanes, limits):
        best.setdefault(lane.method, lane)
    return list(best.values())


def _wanted(lanes: Sequence[Lane], limits: _Limits) -> list[Lane]:
    """What will be shown as a choice, and so has to be true."""
    chosen = [*_front_lanes(lanes, limits), *_best_lanes(lanes, limits)]
    return list({id(lane): lane for lane in chosen}.values())


def _rejected(lanes: Iterable[Lane], front: list[Candidate], limits: _Limits) -> Iterator[Rejected]:
    for lane in lanes:
        c = lane.candidate
        if c is None:
            yield Rejected(lane.card.name, lane.method, lane.why_none)
        elif c not in front:
            yield Rejected(lane.card.name, lane.method, limits.over(c) or _beaten(c, front), c)


def _beaten(c: Candidate, front: list[Candidate]) -> str:
    assert c.dollars is not None
    better = next(f for f in front if f.dollars is not None and f.dollars <= c.dollars and f.hours <= c.hours)
    at_best = "" if c.fits else " at best"
    return (
        f"{hours_text(c.hours)} and {dollars_text(c.dollars)}{at_best}; {better.method} on {better.gpu} takes "
        f"{hours_text(better.hours)} and {dollars_text(better.dollars)}"
    )


def _assumptions(front: list[Candidate]) -> Iterator[str]:
    yield "one GPU a run: training on several is not modelled"
    yield "every row of tokens is full; loading, evaluation and saving are not counted"
    yield "methods do not learn alike: dollars and hours say nothing of the quality reached"
    unmeasured = sorted({c.gpu for c in front if not c.measured_on_this_gpu})
    if unmeasured:
        yield f"never measured on {', '.join(unmeasured)}: scaled from the {shipped().gpu} by peaks and bandwidth"
    for age, who in sorted({(c.price.age(), c.price.provider) for c in front if c.price is not None}):
        yield f"price of {who}: {age}"
    together = {(c.price.provider, c.gpu, c.price.count) for c in front if c.price is not None and c.price.count > 1}
    for who, gpu, count in sorted(together):
        yield f"{who} rents out {gpu} {count} at a time: one GPU's share is counted, so the others need work too"


def flags_of(candidate: Candidate) -> tuple[str, ...]:
    """The options of `memplan cost` and `memplan estimate` that mean this run: the fields that were said."""
    config = candidate.config
    flags = ["--gpu", candidate.gpu]
    for name in type(config).model_fields:
        if name not in config.model_fields_set:
            continue
        value, option = getattr(config, name), "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(option if value else "--no-" + option[2:])
        else:
            flags += [option, ",".join(value) if isinstance(value, tuple) else str(value)]
    return tuple(flags)


def command_of(candidate: Candidate) -> str:
    """`flags_of` as one would type them."""
    return shlex.join(flags_of(candidate))
