"""`cost`: how long a run takes and what it costs, and within what bounds that is known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from memplan import catalog, gpus
from memplan.dataset import CHARS_PER_TOKEN, TokenCounts, count_tokens
from memplan.errors import MemplanError, UnknownNameError
from memplan.estimate import Estimate, ModelLike, make_config
from memplan.gpus import GpuSpec
from memplan.prices import Kind, Price, cheapest, load_prices, prices
from memplan.timing.model import StepTime, step_time
from memplan.timing.profile import fit_for
from memplan.timing.roofline import Fit, shipped
from memplan.train_config import TrainConfig
from memplan.units import exact_percent

PriceSource = Iterable[Price] | str | PathLike[str]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run costs on one GPU. Intervals are (low, high)."""

    model: str
    gpu: str
    config: TrainConfig
    hours: float
    interval: Interval
    """Hours between which the run ends, by what is known of the time model's errors on this GPU."""
    dollars: float | None
    """None where no price is known."""
    dollars_interval: Interval | None
    price: Price | None
    num_tokens: int
    """Tokens trained on, padding not counted."""
    num_steps: int
    step_seconds: float
    tokens_per_second: float
    mfu: float
    """Model FLOPs utilisation: what the method needs, without recomputation, of the GPU's peak."""
    bound_by: str
    """`compute`, `memory bandwidth` or `kernel launches`."""
    device_seconds: dict[str, float] = field(hash=False)
    """Seconds of one step by kind of work on the GPU."""
    host_seconds: float
    """Seconds of one step that launching takes; the longer of the two decides."""
    process_bytes: int
    """What the run takes of the GPU's memory."""
    fits: bool
    measured_on_this_gpu: bool
    assumptions: tuple[str, ...]


def cost(
    model: ModelLike,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    gpu: GpuSpec | str,
    num_tokens: int | None = None,
    num_samples: int | None = None,
    dataset: TokenCounts | str | PathLike[str] | None = None,
    epochs: float = 1.0,
    tokenizer: str | PathLike[str] | None = None,
    chars_per_token: float = CHARS_PER_TOKEN,
    text_field: str | None = None,
    price: float | None = None,
    price_rows: PriceSource | None = None,
    provider: str | None = None,
    kind: Kind | None = "on-demand",
    usd_per_kwh: float | None = None,
    **fields: Any,
) -> Cost:
    """Hours and dollars of fine-tuning `model` on one GPU.

    Exactly one of `num_tokens`, `num_samples` (rows of `seq_len` tokens) and `dataset` (a .jsonl, or its counts)
    says how much there is to train on; `epochs` repeats the latter two. The price is `price` (dollars an hour), or
    `usd_per_kwh` for a card of one's own, or the lowest of `price_rows` (a CSV or rows; the bundled table unless
    given) from `provider`.

    Raises:
        MemplanError: an unknown model, GPU or provider; no or more than one amount, or one that is not above
            zero; a price that is not above zero; a GPU whose peaks are not known.
    """
    card = gpus.get(gpu) if isinstance(gpu, str) else gpu
    spec, decided = catalog.load_with_settings(model)
    run = make_config(config, decided=decided, **fields)
    counts = _dataset(dataset, tokenizer, chars_per_token, text_field)
    amount = amount_of(run, num_tokens=num_tokens, num_samples=num_samples, counts=counts, epochs=epochs)
    paid, price_notes = price_of(
        card, price=price, rows=price_rows, provider=provider, kind=kind, usd_per_kwh=usd_per_kwh
    )
    whole = Estimate(spec, run, card)
    timed = whole if amount.seq_len == run.seq_len else Estimate(spec, run.but(seq_len=amount.seq_len), card)
    return cost_of(whole, step_time(timed, card), amount, paid, (*amount.notes, *price_notes))


@dataclass(frozen=True, slots=True)
class Amount:
    """How much there is to train on."""

    num_tokens: int
    num_steps: int
    seq_len: int
    """Tokens per row as the steps see them, padding included."""
    notes: tuple[str, ...]


def amount_of(
    config: TrainConfig,
    *,
    num_tokens: int | None = None,
    num_samples: int | None = None,
    counts: TokenCounts | None = None,
    epochs: float = 1.0,
) -> Amount:
    """Steps and tokens of a run.

    Raises:
        MemplanError: not exactly one amount, or one that is not above zero.
    """
    given = {"num_tokens": num_tokens, "num_samples": num_samples, "dataset": counts}
    said = [name for name, value in given.items() if value is not None]
    flags = "--num-tokens 50M, --num-samples 10000 or --dataset file.jsonl"
    if not said:
        raise MemplanError("how much is there to train on?", hints=[f"say {flags}"])
    if len(said) > 1:
        raise MemplanError(f"`{said[0]}` and `{said[1]}` both say how much there is to train on", hints=["give one"])
    if not (math.isfinite(epochs) and epochs > 0):
        raise MemplanError(f"epochs must be above zero, not {epochs:g}")
    for name, value in (("num_tokens", num_tokens), ("num_samples", num_samples)):
        if value is not None and value <= 0:
            raise MemplanError(f"{name} must be above zero, not {value}")
    rows_per_step = config.micro_batch_size * config.gradient_accumulation_steps
    if num_tokens is not None:
        if epochs != 1.0:
            raise MemplanError(
                "`epochs` repeats samples or a dataset; tokens are counted in all", hints=["leave it out"]
            )
        note = f"every row holds {config.seq_len} tokens, all of them trained on"
        return Amount(num_tokens, math.ceil(num_tokens / (rows_per_step * config.seq_len)), config.seq_len, (note,))
    if num_samples is not None:
        rows = math.ceil(num_samples * epochs)
        note = f"every sample is a row of {config.seq_len} tokens"
        return Amount(rows * config.seq_len, math.ceil(rows / rows_per_step), config.seq_len, (note,))
    assert counts is not None
    return _amount_of_dataset(config, counts, epochs, rows_per_step)


def _amount_of_dataset(config: TrainConfig, counts: TokenCounts, epochs: float, rows_per_step: int) -> Amount:
    cut = counts.truncated(config.seq_len)
    padded = max(1, math.ceil(cut.padded_length(config.micro_batch_size)))
    rows = math.ceil(counts.num_samples * epochs)
    notes = [
        f"{counts.num_samples:,} examples of {counts.num_tokens / counts.num_samples:,.0f} tokens on average "
        f"({counts.rule})",
        f"rows are padded to the longest of a micro-batch, {padded} tokens on average, and not packed",
    ]
    if longer := counts.num_longer_than(config.seq_len):
        notes.append(f"{longer:,} examples are cut to {config.seq_len} tokens")
    return Amount(math.ceil(cut.num_tokens * epochs), math.ceil(rows / rows_per_step), padded, tuple(notes))


def _dataset(
    dataset: TokenCounts | str | PathLike[str] | None,
    tokenizer: str | PathLike[str] | None,
    chars_per_token: float,
    text_field: str | None,
) -> TokenCounts | None:
    if dataset is None or isinstance(dataset, TokenCounts):
        return dataset
    known = None if tokenizer is None else Path(tokenizer)
    return count_tokens(Path(dataset), tokenizer=known, chars_per_token=chars_per_token, text_field=text_field)


def price_of(
    gpu: GpuSpec,
    *,
    price: float | None = None,
    rows: PriceSource | None = None,
    provider: str | None = None,
    kind: Kind | None = "on-demand",
    usd_per_kwh: float | None = None,
) -> tuple[Price | None, tuple[str, ...]]:
    """What an hour of `gpu` costs, and what to say about it. None, and why, where no price is known.

    Raises:
        MemplanError: a price that is not above zero, two prices at once, or an unknown provider.
    """
    if price is not None and usd_per_kwh is not None:
        raise MemplanError("a price an hour and a price of power are both given", hints=["give one"])
    if price is not None:
        return Price("as given", gpu.name, _above_zero(price, "price"), source="as given"), ()
    if usd_per_kwh is not None:
        if gpu.tdp_watts is None:
            raise MemplanError(f"what `{gpu.name}` draws is not known", hints=["give dollars an hour with --price"])
        hourly = _above_zero(usd_per_kwh, "price of a kWh") * gpu.tdp_watts / 1000
        note = f"power alone: {gpu.tdp_watts} W, the card's limit, at ${usd_per_kwh:g} a kWh; the host is not counted"
        return Price("own card", gpu.name, hourly, source=f"{gpu.tdp_watts} W x ${usd_per_kwh:g}/kWh"), (note,)
    table = price_table(rows)
    check_provider(provider, table)
    if gpu.name not in gpus.names():
        return None, (f"no price for `{gpu.name}`: give one with --price",)
    found = cheapest(gpu.name, rows=table, kind=kind, provider=provider)
    if found is None:
        where = f" from {provider}" if provider else ""
        return None, (f"no {kind or ''} price for `{gpu.name}`{where}: give one with --price".replace("  ", " "),)
    return found, tuple(_price_notes(found))


def price_table(rows: PriceSource | None) -> tuple[Price, ...]:
    """The bundled offers, those of a CSV, or the given ones."""
    if rows is None:
        return prices()
    return load_prices(Path(rows)) if isinstance(rows, str | PathLike) else tuple(rows)


def check_provider(provider: str | None, table: Iterable[Price]) -> None:
    """Raises UnknownNameError if nobody in `table` is called so."""
    known = {row.provider for row in table}
    if provider is not None and provider not in known:
        raise UnknownNameError("provider", provider, known)


def _price_notes(price: Price) -> Iterable[str]:
    what = " ".join(part for part in (price.provider, price.instance, price.region) if part)
    yield f"${price.usd_per_gpu_hour:.2f} an hour: {what}, {price.kind}, {price.age()}"
    if price.count > 1:
        yield (
            f"it is rented {price.count} at a time for ${price.usd_per_hour:.2f} an hour; one GPU's share is counted"
        )


def _above_zero(value: float, what: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise MemplanError(f"{what} must be above zero, not {value:g}")
    return value


def cost_of(estimate: Estimate, time: StepTime, amount: Amount, price: Price | None, notes: Iterable[str] = ()) -> Cost:
    """The cost of a run whose step has been timed."""
    gpu, config = estimate.gpu, estimate.config
    assert gpu is not None
    hours = time.step_seconds * amount.num_steps / 3600
    fit = fit_for(gpu)
    interval, interval_note = bounds(hours, time, gpu, fit)
    hourly = None if price is None else price.usd_per_gpu_hour
    fits = estimate.process_bytes <= gpu.memory_bytes
    return Cost(
        model=estimate.model.label,
        gpu=gpu.name,
        config=config,
        hours=hours,
        interval=interval,
        dollars=None if hourly is None else hours * hourly,
        dollars_interval=None if hourly is None else (interval[0] * hourly, interval[1] * hourly),
        price=price,
        num_tokens=amount.num_tokens,
        num_steps=amount.num_steps,
        step_seconds=time.step_seconds,
        tokens_per_second=amount.num_tokens / (hours * 3600),
        mfu=time.mfu,
        bound_by=time.bound_by,
        device_seconds=time.device_seconds,
        host_seconds=time.host_seconds,
        process_bytes=estimate.process_bytes,
        fits=fits,
        measured_on_this_gpu=gpu.name == fit.gpu,
        assumptions=(*notes, interval_note, "loading the model, evaluation and saving are not counted"),
    )


def bounds(hours: float, time: StepTime, gpu: GpuSpec, fit: Fit) -> tuple[Interval, str]:
    """The interval around `hours` and why it is that wide.

    On the measured GPU it is the 90th percentile of the errors on runs that the model was not fitted to. On any other
    one nothing was measured: no run is faster than the GPU's peaks allow, nor than the host launches its kernels, which
    is the lower bound; the upper one lies as far above as that one below, in proportion.
    """
    p90 = fit.held_out["p90"]
    if gpu.name == fit.gpu:
        where = "" if fit is shipped() else f", {fit.source}"
        note = f"nine of ten measured runs on this GPU came out within {exact_percent(p90, 0)} (runs not fitted{where})"
        return (hours * (1 - p90), hours * (1 + p90)), note
    fastest = max(time.floor_seconds, time.host_seconds * (1 - p90))
    share = min(fastest / time.step_seconds, 1 - p90)
    note = f"never measured on this GPU: scaled from the {fit.gpu} by peaks and bandwidth"
    return (hours * share, hours / share), note
