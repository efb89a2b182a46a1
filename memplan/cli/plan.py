"""`memplan plan`: the best ways to train on so many tokens, by dollars and hours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli import amounts, options
from memplan.cli.amounts import AMOUNT, PRICE
from memplan.cli.figures import gib
from memplan.cli.output import display, emit
from memplan.cli.render import bold, command, dim, heading, line, paragraph, table
from memplan.errors import MemplanError
from memplan.units import dollars_text, hours_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memplan.plan import Plan
    from memplan.plan_search import Candidate

EPILOG = """Examples:

  memplan plan llama-7b --num-tokens 50M

  memplan plan qwen3-8b --num-tokens 20M --methods lora,qlora --gpus rtx-4090,l40s,a100-80gb --max-hours 24

  memplan plan llama-3.1-70b --num-tokens 1B --provider nebius --plot front.png
"""
_SHOWN_REASONS = 12


def register(app: typer.Typer, summary: str) -> None:
    app.command("plan", short_help=summary, epilog=EPILOG)(plan)


@options.takes_run(without=("method", "gradient_accumulation_steps"))
def plan(
    model: options.Model,
    run: dict[str, Any],
    num_tokens: amounts.NumTokens = None,
    total_batch_size: Annotated[
        int,
        typer.Option(
            help="Sequences per optimizer step, the same for all (total_train_batch_size).", rich_help_panel=AMOUNT
        ),
    ] = 16,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Methods to choose from.",
            rich_help_panel=options.METHOD,
            autocompletion=options.listed(options.complete_methods),
        ),
    ] = "full,lora,qlora",
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="GPUs to choose from; all with a price unless told.",
            rich_help_panel=options.DEVICE,
            autocompletion=options.listed(options.complete_gpus),
            show_default=False,
        ),
    ] = None,
    max_usd: Annotated[
        float | None, typer.Option(help="Dollars it may cost.", rich_help_panel=AMOUNT, show_default=False)
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option(help="Hours it may take.", rich_help_panel=AMOUNT, show_default=False)
    ] = None,
    price: amounts.Hourly = None,
    prices: amounts.PriceFile = None,
    provider: amounts.Provider = None,
    kind: amounts.PriceKind = "on-demand",
    live: Annotated[
        bool, typer.Option("--live", help="Today's offers from gpuhunt, for --gpus.", rich_help_panel=PRICE)
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Draw dollars against hours.", rich_help_panel=options.OUTPUT, show_default=False
        ),
    ] = None,
    why: Annotated[
        bool,
        typer.Option(
            "--why",
            help="Every method and GPU that was left out, not only the nearest.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """The cheapest, the fastest and the best ways to train on so many tokens.

    Searches methods, GPUs, micro-batches and checkpointing; keeps what fits, and what nothing beats in both dollars and
    hours. A micro-batch size or checkpointing that is given is kept. One GPU a run: training on several is not
    modelled, so that no number of GPUs is offered.
    """
    from memplan.plan import plan as plan_runs

    tokens = amounts.parse_count(num_tokens, "--num-tokens")
    if tokens is None:
        raise MemplanError("how much is there to train on?", hints=["say --num-tokens 50M"])
    names = None if gpus is None else _names(gpus)
    if live and names is None:
        raise MemplanError("--live asks for one GPU at a time", hints=["name them: --gpus h100-sxm,l40s"])
    result = plan_runs(
        model,
        run,
        num_tokens=tokens,
        methods=_names(methods),  # type: ignore[arg-type]  # checked by plan, which names the known ones
        gpu_names=names,
        total_batch_size=total_batch_size,
        max_usd=max_usd,
        max_hours=max_hours,
        price=price,
        price_rows=amounts.offers(prices, live=live, gpus=names or ()),
        provider=provider,
        kind=kind,
    )
    if plot is not None:
        from memplan.plot import plan_front
        from memplan.plot.save import save

        save(plan_front(result), plot)
    if as_json:
        from memplan.cost_report import PlanReport

        emit(PlanReport.of(result).model_dump_json(indent=2))
        return
    display(plan_lines(result, all_reasons=why))
    if plot is not None:
        emit(f"drawn to {plot}", err=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def plan_lines(result: Plan, *, all_reasons: bool) -> Iterator[RenderableType]:
    from memplan.plan import command_of

    tokens = f"{result.num_tokens:,} tokens, {result.total_batch_size} sequences a step"
    yield line(bold(result.model), f": {tokens}")
    yield ""
    if result.front:
        yield heading("nothing beats these in both dollars and hours", "memory of the GPU taken, GiB")
        yield table([_row(result, c) for c in result.front], "lrrllrt")
        yield ""
        for number, c in enumerate(result.front, 1):
            asked = f"--num-tokens {result.num_tokens}" + (f" --price {c.price.usd_per_gpu_hour:g}" if c.price else "")
            yield command(f"memplan cost {result.model} {command_of(c)} {asked}", first=f"  {number}. ")
        yield ""
    else:
        yield "nothing fits, or nothing is within the limits"
        yield ""
    others = {method: c for method, c in result.best.items() if c not in result.front}
    if others:
        yield heading("cheapest of the other methods")
        yield table([_row(result, c) for c in others.values()], "lrrllrt")
        yield ""
    yield from _reasons(result, everything=all_reasons)
    yield ""
    looked = f"{result.num_configurations:,} configurations looked at, {result.num_played} played on the allocator"
    for said in (*result.assumptions, looked):
        yield paragraph(said, style="dim")


def _row(result: Plan, c: Candidate) -> tuple[RenderableType, ...]:
    number = str(result.front.index(c) + 1) + "." if c in result.front else ""
    marks = [
        name
        for name, marked in (
            ("cheapest", result.cheapest),
            ("fastest", result.fastest),
            ("take this", result.recommended),
        )
        if c is marked
    ]
    memory = f"{gib(c.process_bytes)} of {gib(c.memory_bytes)}"
    style = "bold" if c is result.recommended else ""
    said = line((", ".join(marks), style))
    return number, dollars_text(c.dollars), hours_text(c.hours), c.method, c.gpu, memory, said


def _reasons(result: Plan, *, everything: bool) -> Iterator[RenderableType]:
    """Why the others lose, the nearest first: those that would run, by dollars, then those that would not."""
    rows = sorted(
        result.rejected,
        key=lambda row: (row.candidate is None, (row.candidate and row.candidate.dollars) or 0.0, row.gpu, row.method),
    )
    shown = rows if everything else rows[:_SHOWN_REASONS]
    if shown:
        yield heading("why not the others")
        yield table([(row.method, row.gpu, row.reason) for row in shown], "llt")
    if len(rows) > len(shown):
        yield dim(f"  and {len(rows) - len(shown)} more: --why shows them")
