"""`memplan fit`: will it fit on my GPU, and if not, what do I change?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli import options
from memplan.cli.estimate import title
from memplan.cli.figures import gib, percent
from memplan.cli.output import display, emit
from memplan.cli.render import STYLES, bar, bold, dim, heading, line, paragraph, table, verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memplan.fit import FitReport

EPILOG = """Examples:

  memplan fit llama-7b --method qlora --gpu rtx-4090

  memplan fit llama-3-70b --method qlora --gpu 48GiB && python train.py

  memplan fit qwen3-8b --method full

Exit status: 0 fits, 1 does not, 2 bad input. Too close to call is 0, and 1 under --strict.
"""

Free = Annotated[
    bool,
    typer.Option("--free", metavar="", help="With --gpu auto: count only what is free now.", rich_help_panel="Device"),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", metavar="", help="Too close to call is no: exit status 1.", rich_help_panel="Output"),
]


def register(app: typer.Typer, summary: str) -> None:
    app.command("fit", short_help=summary, epilog=EPILOG)(fit)


@options.takes_run()
def fit(
    model: options.Model,
    run: dict[str, Any],
    gpu: options.Gpu = None,
    free: Free = False,
    strict: Strict = False,
    allocator: options.Allocator = None,
    as_json: options.Json = False,
) -> None:
    """Whether a run fits on a GPU; if not, the changes that make it fit; if so, how much further it goes.

    Without --gpu it is the GPU of this machine, or a table over common cards where there is none.
    """
    from memplan import gpus
    from memplan.errors import MemplanError
    from memplan.fit import fit as fit_run

    if gpu is None:
        try:
            gpus.detect()
        except MemplanError:
            if free:
                raise
            _over_cards(model, run, allocator, as_json)
            return
        gpu = "auto"
    report = fit_run(model, run, gpu=gpu, free_only=free, allocator=allocator)
    if as_json:
        from memplan.report_fit import FitDocument

        emit(FitDocument.of(report).model_dump_json(indent=2))
    else:
        display(fit_lines(report))
    if report.verdict == "does not fit" or (strict and not report.fits):
        raise typer.Exit(1)


def _over_cards(model: str, run: dict[str, Any], allocator: str | None, as_json: bool) -> None:
    from memplan.fit import over_cards

    reports = over_cards(model, run, allocator=allocator)
    if as_json:
        from memplan.report_fit import CardsDocument

        emit(CardsDocument.of(reports).model_dump_json(indent=2))
        return
    display(card_lines(reports))


def card_lines(reports: Sequence[FitReport]) -> Iterator[RenderableType]:
    """One run over many cards; each bar is as long as its card has memory."""
    yield title(reports[0].estimate)
    yield ""
    yield heading("on common cards", "GiB; name yours with --gpu")
    rows = [
        (
            r.gpu.name,
            gib(r.capacity_bytes),
            gib(r.process_bytes),
            percent(r.process_bytes, r.capacity_bytes),
            _signed(r.headroom_bytes),
            verdict(r.verdict),
            bar(r.process_bytes, r.capacity_bytes, STYLES[r.verdict]),
        )
        for r in reports
    ]
    yield table(rows, "lrrrrlb", heads=("card", "has", "needed", "", "to spare", "", ""))


def fit_lines(report: FitReport) -> Iterator[RenderableType]:
    yield title(report.estimate)
    needed, capacity = report.process_bytes, report.capacity_bytes
    longer = max(needed, capacity)
    yield ""
    yield table(
        [
            ("needs", gib(needed), bar(needed, longer, STYLES[report.verdict])),
            (report.gpu.name, gib(capacity), bar(capacity, longer, "none")),
        ],
        "lrb",
    )
    yield ""
    yield line(verdict(report.verdict, style="bold"), (f": {_in_words(report)}", "bold"))
    if report.largest:
        yield table(
            [(f"largest {knob.replace('_', '-')} that fits, alone", f"{n:,}") for knob, n in report.largest.items()],
            "lr",
        )
    if report.verdict != "fits":
        yield from _why(report)


def _in_words(report: FitReport) -> str:
    has, headroom = report.capacity_bytes, report.headroom_bytes
    share = percent(abs(headroom), has)
    loading = report.estimate.load_process_bytes
    if headroom < 0 and report.verdict == "fits":
        return "only by giving cached memory back to the driver, which costs time"
    if headroom < 0:
        said = f"{gib(-headroom)} GiB short of {gib(has)} GiB ({share})"
    elif loading > has:
        said = f"loading takes {gib(loading)} GiB of {gib(has)} GiB"
    else:
        said = f"{gib(headroom)} GiB to spare ({share})"
    if report.verdict != "too close to call":
        return said
    return f"{said}; measured runs have taken up to {gib(report.band_bytes)} GiB beyond their prediction"


def _why(report: FitReport) -> Iterator[RenderableType]:
    made = report.estimate
    alive = sorted(made.components.items(), key=lambda item: -item[1])[:4]
    parts = ", ".join(f"{name.replace('_', ' ')} {gib(size)}" for name, size in alive)
    yield paragraph(f"alive at the peak ({made.peak_phase}): {parts} GiB")
    if not report.suggestions:
        yield paragraph("no one change, and no two, of those memplan knows make it fit")
        return
    yield ""
    yield heading("what makes it fit", "GiB then needed")
    rows: list[tuple[RenderableType, ...]] = []
    for suggestion in report.suggestions:
        said = f"in place of {suggestion.in_place_of}; " if suggestion.in_place_of else ""
        rows.append((gib(suggestion.process_bytes), bold(suggestion.flags)))
        rows.append(("", dim(said + suggestion.cost)))
    yield table(rows, "rt")


def _signed(num_bytes: int) -> str:
    return ("-" if num_bytes < 0 else "") + gib(abs(num_bytes))
