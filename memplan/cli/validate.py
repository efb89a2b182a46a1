"""`memplan validate`: replay measured runs and print how far off the predictions are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli import options
from memplan.cli.output import display, emit
from memplan.cli.render import bold, heading, paragraph, table
from memplan.units import GIB, MIB, exact_percent

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memplan.calibration.compare import Summary
    from memplan.traced_runs import TracedRun
    from memplan.validation import Validation

EPILOG = """Examples:

  memplan validate

  memplan validate --by family --worst 20

  memplan validate my-gpu.jsonl --plot predicted-vs-measured.png

  memplan validate my-gpu.jsonl --components
"""

UNTRACED = "before_the_trace"
UNTRACED_NOTE = (
    "before the trace: allocated between the load and the traced step, so without a stack: optimizer states, "
    "workspaces, inputs, and what the first step makes of the other components"
)
KEYS = ("file", "method", "base", "stack", "family")
Files = Annotated[
    list[Path] | None,
    typer.Argument(help="Record files that `memplan calibrate` wrote; those shipped with memplan unless given."),
]
By = Annotated[
    str,
    typer.Option(metavar="KEY", help="Group by " + ", ".join(KEYS) + ".", rich_help_panel=options.OUTPUT),
]
Worst = Annotated[
    int, typer.Option(metavar="N", min=0, help="List the N worst rows of each tier.", rich_help_panel=options.OUTPUT)
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Draw predicted against measured (png, svg, pdf).", rich_help_panel=options.OUTPUT
    ),
]
Components = Annotated[
    bool,
    typer.Option(
        "--components",
        metavar="",
        help="Also compare component by component, where `memplan calibrate --snapshot` kept a trace.",
        rich_help_panel=options.OUTPUT,
    ),
]


def register(app: typer.Typer, summary: str) -> None:
    app.command("validate", short_help=summary, epilog=EPILOG)(validate)


def validate(
    files: Files = None,
    by: By = "method",
    worst: Worst = 3,
    plot: Plot = None,
    components: Components = False,
    as_json: options.Json = False,
) -> None:
    """Replays measured training steps: what memplan predicts for each, and how far off it is.

    No GPU and no torch: this is how anybody checks our figures in seconds.
    """
    from memplan.cli.progress import counted
    from memplan.errors import MemplanError, UnknownNameError
    from memplan.validation import validate as validate_files

    if by not in KEYS:
        raise UnknownNameError("key", by, KEYS)
    with counted("replaying") as progress:
        validation = validate_files(files or (), progress=progress)
    comparison = validation.comparison
    if not (validation.runs or comparison.verdicts or comparison.unpredicted):
        raise MemplanError("no run in these files has finished", hints=["`memplan calibrate` measures some"])
    traced = traced_of(files or (), validation) if components else []
    if plot is not None:
        from memplan.plot import predicted_against_measured, save

        save(predicted_against_measured(validation), plot)
        emit(f"wrote {plot}", err=True)
    if as_json:
        from memplan.report_validation import ValidationDocument

        emit(ValidationDocument.of(validation, traced).model_dump_json(indent=2))
        return
    components_of = ["", *component_lines(traced, worst)] if traced else []
    display([*validation_lines(validation, by, worst), *components_of])


def traced_of(files: Sequence[Path], validation: Validation) -> list[TracedRun]:
    from memplan.errors import MemplanError
    from memplan.traced_runs import traced_runs, traces_of

    traced = traced_runs(validation, files)
    if not traced:
        hints = ["`memplan calibrate --snapshot` keeps the allocation trace of every run it measures"]
        if not files:
            raise MemplanError("the records shipped with memplan come without allocation traces", hints=hints)
        folders = " or ".join(f"`{traces_of(path)}`" for path in files)
        raise MemplanError(f"there is no trace of these runs in {folders}", hints=hints)
    return traced


def component_lines(traced: Sequence[TracedRun], count: int) -> Iterator[RenderableType]:
    """How many runs have every component as predicted, and the `count` runs that are furthest off, in full."""
    equal = sum(not one.misplaced_bytes for one in traced)
    yield heading("components at the allocated peak", "MiB, predicted and as traced")
    yield f"every component to the byte: {equal} of {len(traced)} traced runs"
    for one in sorted(traced, key=lambda one: -one.misplaced_bytes)[: max(count, 1)]:
        yield ""
        yield heading(f"  {one.run.record.case.id}", f"peak in {one.peak.phase}")
        rows = []
        for row in one.rows:
            off = f"{row.difference_bytes:+,} B" if row.difference_bytes else ""
            sizes = (f"{num_bytes / MIB:,.2f}" for num_bytes in (row.predicted_bytes, row.measured_bytes))
            rows.append((row.component.replace("_", " "), *sizes, off))
        yield table(rows, "lrrr", heads=("", "predicted", "traced", "difference"), indent=4)
    if any(row.component == UNTRACED for one in traced for row in one.rows):
        yield ""
        yield paragraph(UNTRACED_NOTE, style="dim")


def validation_lines(validation: Validation, by: str, worst: int) -> Iterator[RenderableType]:
    comparison = validation.comparison
    yield bold(f"{len(validation.runs)} measured runs against their predictions")
    share = validation.share_of_right_phases
    if share is not None:
        yield f"peak in the phase predicted: {exact_percent(share, 1)}"
    yield ""
    yield heading("error", "share of the measured bytes; low: under by more than 0.5 %")
    yield _errors({s.tier: s for s in comparison.summaries.values()})
    for tier in comparison.summaries:
        groups = {name: summaries[tier] for name, summaries in _groups(validation, by).items() if tier in summaries}
        if len(groups) > 1:
            yield ""
            yield heading(f"{tier}, by {by}")
            yield _errors(groups)
    if worst:
        yield ""
        yield heading(f"the {worst} worst of each tier")
        rows = []
        for tier in comparison.summaries:
            for row in validation.worst(tier, worst):
                off = (row.predicted_bytes - row.measured_bytes) / MIB
                rows.append((tier, row.case_id, exact_percent(row.error, 2, sign="+"), f"{off:+,.1f} MiB"))
        yield table(rows, "ltrr")
    if comparison.verdicts:
        false_fits = sum(v.is_false_fit for v in comparison.verdicts)
        yield ""
        verdicts, fits = "s" * (len(comparison.verdicts) != 1), "s" * (false_fits != 1)
        yield f"{len(comparison.verdicts)} verdict{verdicts} at a limit of memory, {false_fits} false fit{fits}"
    for unpredicted in comparison.unpredicted:
        yield paragraph(f"not predicted: {unpredicted.case_id}: {unpredicted.reason}", style="dim")


def row_lines(validation: Validation) -> Iterator[RenderableType]:
    """Every run: predicted and measured in each tier, and whether those that ran out of memory were told to."""
    yield heading("every run", "GiB, predicted and measured")
    for run in validation.runs:
        yield f"  {run.record.case.id}"
        rows = []
        for row in run.rows:
            sizes = (f"{num_bytes / GIB:,.3f}" for num_bytes in (row.predicted_bytes, row.measured_bytes))
            off = (row.predicted_bytes - row.measured_bytes) / MIB
            rows.append((row.tier, *sizes, exact_percent(row.error, 2, sign="+"), f"{off:+,.1f} MiB"))
        yield table(rows, "lrrrr", indent=4)
    for verdict in validation.comparison.verdicts:
        yield f"  {verdict.case_id}"
        said, was = ("fits" if yes else "does not fit" for yes in (verdict.predicted_fits, verdict.ran))
        sizes = (f"{num_bytes / GIB:,.3f}" for num_bytes in (verdict.predicted_bytes, verdict.limit_bytes))
        yield "    predicted {} of {}: {}, measured: {}".format(*sizes, said, was)


def _groups(validation: Validation, by: str) -> dict[str, dict[str, Summary]]:
    return validation.by(lambda run: str(getattr(run, by)))


def _errors(summaries: Mapping[str, Summary]) -> RenderableType:
    heads = ("", "runs", "mean", "median", "worst", "bias", "low")
    return table([_cells(name, summary) for name, summary in summaries.items()], "trrrrrr", heads=heads)


def _cells(name: str, summary: Summary) -> tuple[str, ...]:
    return (
        name,
        str(summary.num_runs),
        exact_percent(summary.mean, 3),
        exact_percent(summary.median, 3),
        exact_percent(summary.worst, 2, sign="+"),
        exact_percent(summary.bias, 3, sign="+"),
        str(summary.num_dangerous),
    )
