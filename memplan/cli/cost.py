"""`memplan cost`: how long one run takes on one GPU, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli import amounts, options
from memplan.cli.amounts import AMOUNT, PRICE
from memplan.cli.figures import gib, percent
from memplan.cli.output import display, emit
from memplan.cli.render import bar, bold, heading, line, paragraph, table, warning
from memplan.dataset import CHARS_PER_TOKEN
from memplan.errors import MemplanError
from memplan.units import dollars_text, hours_text, human

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memplan.cost import Cost
    from memplan.storage import Storage

EPILOG = """Examples:

  memplan cost llama-7b --gpu h100-sxm --num-tokens 50M

  memplan cost qwen3-8b --method qlora --gpu rtx-4090 --own --kwh 0.30 --dataset train.jsonl --epochs 3

  memplan cost llama-3.1-8b --gpu a100-80gb --num-samples 20000 --price 1.79 --variants 50
"""


def register(app: typer.Typer, summary: str) -> None:
    app.command("cost", short_help=summary, epilog=EPILOG)(cost)


@options.takes_run()
def cost(
    model: options.Model,
    run: dict[str, Any],
    gpu: options.Gpu = None,
    num_tokens: amounts.NumTokens = None,
    num_samples: Annotated[
        str | None,
        typer.Option(metavar="20k", help="Rows of --seq-len tokens.", rich_help_panel=AMOUNT, show_default=False),
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Examples, one JSON object a line.", rich_help_panel=AMOUNT, show_default=False
        ),
    ] = None,
    epochs: Annotated[
        float, typer.Option(help="How often samples or dataset are gone through.", rich_help_panel=AMOUNT)
    ] = 1.0,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A tokenizer.json or its folder, to count the dataset's tokens.",
            rich_help_panel=AMOUNT,
            show_default=False,
        ),
    ] = None,
    chars_per_token: Annotated[
        float, typer.Option(help="Characters that count as a token, without a tokenizer.", rich_help_panel=AMOUNT)
    ] = CHARS_PER_TOKEN,
    text_field: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Where a line has its text, if it is no usual key.",
            rich_help_panel=AMOUNT,
            show_default=False,
        ),
    ] = None,
    price: amounts.Hourly = None,
    prices: amounts.PriceFile = None,
    provider: amounts.Provider = None,
    kind: amounts.PriceKind = "on-demand",
    live: amounts.Live = False,
    own: Annotated[
        bool, typer.Option("--own", help="A card of your own: power is all it costs.", rich_help_panel=PRICE)
    ] = False,
    kwh: Annotated[
        float | None,
        typer.Option(metavar="0.30", help="US dollars a kWh, with --own.", rich_help_panel=PRICE, show_default=False),
    ] = None,
    variants: Annotated[
        int | None,
        typer.Option(
            help="Also what so many fine-tuned models take to keep.", rich_help_panel=options.OUTPUT, show_default=False
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """How long a run takes on one GPU, what it costs, and what bounds it."""
    from memplan.cost import cost as cost_of_run
    from memplan.storage import storage as storage_of_run

    if gpu is None:
        raise MemplanError("on which GPU?", hints=["name one: --gpu h100-sxm (`memplan gpus` lists them)"])
    if own != (kwh is not None):
        raise MemplanError(
            "--own and --kwh go together", hints=["a card of one's own costs its power: --own --kwh 0.30"]
        )
    result = cost_of_run(
        model,
        run,
        gpu=gpu,
        num_tokens=amounts.parse_count(num_tokens, "--num-tokens"),
        num_samples=amounts.parse_count(num_samples, "--num-samples"),
        dataset=dataset,
        epochs=epochs,
        tokenizer=tokenizer,
        chars_per_token=chars_per_token,
        text_field=text_field,
        price=price,
        price_rows=amounts.offers(prices, live=live, gpus=[gpu]),
        provider=provider,
        kind=kind,
        usd_per_kwh=kwh,
    )
    kept = None if variants is None else storage_of_run(model, run, num_variants=variants)
    if as_json:
        from memplan.cost_report import CostReport

        emit(CostReport.of(result, kept).model_dump_json(indent=2))
        return
    display(cost_lines(result, kept))


def cost_lines(result: Cost, kept: Storage | None) -> Iterator[RenderableType]:
    config = result.config
    rank = f" rank {config.rank}" if config.trains_adapters else ""
    batch = f"{config.micro_batch_size} × {config.seq_len} tokens"
    if config.gradient_accumulation_steps > 1:
        batch += f" × {config.gradient_accumulation_steps} steps accumulated"
    yield line(bold(result.model), f": {config.method}{rank}, {batch}, on {result.gpu}")
    yield ""
    low, high = result.interval
    rows: list[tuple[RenderableType, ...]]
    rows = [("time", bold(hours_text(result.hours)), f"between {hours_text(low)} and {hours_text(high)}")]
    if result.dollars is not None and result.dollars_interval is not None:
        between = " and ".join(map(dollars_text, result.dollars_interval))
        rows.append(("cost", bold(dollars_text(result.dollars)), f"between {between}"))
    else:
        rows.append(("cost", "no price", ""))
    rows.append(("speed", f"{result.tokens_per_second:,.0f} tokens/s", f"{result.num_tokens:,} tokens"))
    rows.append(("step", f"{result.step_seconds:.3g} s", f"{result.num_steps:,} steps"))
    rows.append(("MFU", percent(result.mfu, 1), "of the GPU's peak, recomputation not counted"))
    yield table(rows, "lrt")
    yield ""
    yield heading("one step", f"bound by {result.bound_by}")
    yield table(_part_rows(result), "lrrb")
    yield ""
    if not result.fits:
        yield warning(f"it does not fit: {gib(result.process_bytes)} GiB on {result.gpu}; see `memplan fit`")
    if kept is not None:
        yield heading(f"{kept.num_variants} fine-tuned models on disk")
        yield table(
            [
                ("full copies", human(kept.full_copies_bytes), ""),
                ("base and adapters", human(kept.adapters_bytes), f"{human(kept.adapter_bytes)} an adapter"),
            ],
            "lrt",
        )
        yield ""
    for said in result.assumptions:
        yield paragraph(said, style="dim")


def _part_rows(result: Cost) -> list[tuple[RenderableType, ...]]:
    """The device's work by kind, and the host beside it: the longer of the two decides."""
    device = sum(result.device_seconds.values())
    whole = max(device, result.host_seconds)
    parts = [(name, seconds) for name, seconds in result.device_seconds.items() if seconds]
    rows = [
        (name, f"{seconds * 1e3:,.1f} ms", percent(seconds, device), bar(seconds, whole)) for name, seconds in parts
    ]
    host = result.host_seconds
    return [*rows, ("host launching them", f"{host * 1e3:,.1f} ms", "", bar(host, whole))]
