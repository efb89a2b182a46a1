"""`memplan calibrate`: run real short training steps on the GPU at hand and print how far off memplan was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli import options
from memplan.cli.figures import gib
from memplan.cli.output import display, emit
from memplan.cli.render import paragraph
from memplan.errors import MemplanError

if TYPE_CHECKING:
    from memplan.calibration.record import RecordFile

EPILOG = """Examples:

  memplan calibrate --quick

  memplan calibrate llama-7b --method qlora --seq-len 2048

  memplan calibrate --full --out my-gpu.jsonl
"""

MEASURING = "Measuring"
Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Measure exactly this model and run; a set of runs unless given.",
                   autocompletion=options.complete_models, show_default=False),
]  # fmt: skip
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="The same, as an option.", autocompletion=options.complete_models,
                 rich_help_panel=MEASURING, show_default=False),
]  # fmt: skip
Quick = Annotated[
    bool, typer.Option("--quick", metavar="", help="About a minute; any GPU of 8 GB.", rich_help_panel=MEASURING)
]
Full = Annotated[
    bool, typer.Option("--full", metavar="", help="150 drawn runs, half an hour.", rich_help_panel=MEASURING)
]
Seed = Annotated[int, typer.Option(metavar="N", help="Draws the runs.", rich_help_panel=MEASURING)]
Out = Annotated[
    Path, typer.Option(metavar="FILE", help="Records, JSON lines; a file that is there is gone on with.",
                       rich_help_panel=options.OUTPUT),
]  # fmt: skip
Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", min=1, help="What one run may take.", rich_help_panel=MEASURING)
]
Limit = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=1, help="Begin no run after this long.", rich_help_panel=MEASURING),
]
Snapshot = Annotated[
    bool,
    typer.Option(
        "--snapshot", metavar="", help="Keep allocation traces; compare by component.", rich_help_panel=MEASURING
    ),
]
Busy = Annotated[
    bool, typer.Option("--busy", metavar="", help="Measure though other processes hold memory.",
                       rich_help_panel=MEASURING),
]  # fmt: skip

SHARE_THAT_FITS = 0.92
"""Runs are chosen by their predicted process memory: at most this share of the card."""


def register(app: typer.Typer, summary: str) -> None:
    app.command("calibrate", short_help=summary, epilog=EPILOG)(calibrate)


@options.takes_run()
def calibrate(
    model: Model = None,
    run: dict[str, Any] | None = None,
    model_option: ModelOption = None,
    quick: Quick = False,
    full: Full = False,
    seed: Seed = 0,
    out: Out = Path("memplan-records.jsonl"),
    timeout: Timeout = 180.0,
    limit_seconds: Limit = None,
    snapshot: Snapshot = False,
    busy: Busy = False,
) -> None:
    """Runs real short training steps on this machine's GPU and compares them with their predictions.

    Models have random weights and nothing is downloaded. Finished runs are
    kept whatever happens to the rest. The constants of this GPU, of memory and
    of time, go into a profile that later estimates use.
    """
    from memplan import gpus

    run = run or {}
    if model is not None and model_option is not None and model != model_option:
        raise MemplanError(f"two models: `{model}` and `--model {model_option}`", hints=["give one"])
    model = model_option if model is None else model
    if quick + full + (model is not None) > 1:
        raise MemplanError("`--quick`, `--full` and a MODEL are three ways to say what to run", hints=["give one"])
    if run and model is None:
        raise MemplanError("options of a run need the MODEL to run", hints=["`memplan calibrate MODEL --method lora`"])
    try:
        card = gpus.detect()
    except MemplanError as error:
        useful = [hint for hint in error.hints if "--gpu" not in hint]  # a card by name has no steps to run
        hints = ["`memplan validate` replays the shipped measurements without a GPU", *useful]
        raise MemplanError(error.message, hints=hints) from None
    held = card.total_bytes - card.free_bytes
    if held > 0.1 * card.total_bytes and not busy:
        raise MemplanError(
            f"{gib(held)} GiB of {gib(card.total_bytes)} GiB on this GPU are taken by others",
            hints=["stop them, or measure all the same with `--busy`", "`memplan validate` needs no GPU"],
        )
    from memplan.calibration.choose import cases_for

    cases = cases_for(card, model, run, quick=quick, full=full, seed=seed, share=SHARE_THAT_FITS)
    if snapshot:
        cases = [case.model_copy(update={"snapshot": True, "snapshot_step": 0}) for case in cases]  # 0: the whole run
    _measure(cases, out, timeout, limit_seconds)
    _report(out)


def _measure(cases: list[Any], out: Path, timeout: float, limit_seconds: float | None) -> None:
    from memplan.calibration.measure import measure
    from memplan.calibration.record import read_records

    done = {record.case.id for record in read_records(out).records} if out.exists() else set()
    todo = [case for case in cases if case.id not in done]
    if done:
        emit(f"{len(cases) - len(todo)} of {len(cases)} runs are in {out} already", err=True)
    if not todo:
        return
    try:
        left = measure(todo, out, out.with_name(out.name + ".traces"), timeout, limit_seconds)
    except KeyboardInterrupt:
        emit(f"interrupted; finished runs are in {out}", err=True)
        if not out.exists():
            raise
        _report(out)
        raise typer.Exit(130) from None
    if left:
        emit(f"{left} runs were not begun: the time was up", err=True)


def _report(out: Path) -> None:
    from memplan import profiles
    from memplan.calibration.profile_of import profile_of
    from memplan.calibration.record import read_records
    from memplan.cli.validate import component_lines, row_lines, validation_lines
    from memplan.traced_runs import traced_runs
    from memplan.validation import validate

    file = read_records(out)
    validation = validate([out])
    display([*row_lines(validation), "", *validation_lines(validation, "method", 3)])
    try:
        traced = traced_runs(validation, [out])
    except MemplanError as error:  # of what was measured nothing is lost
        emit(f"components are not compared: {error.message}", err=True)
    else:
        if traced:
            display(["", *component_lines(traced, 3)])
    for record in file.records:
        if record.status not in ("ok", "oom"):
            display([paragraph(f"{record.case.id}: {record.status}: {record.error}")], err=True)
    if file.environment is not None:
        path = profiles.save(profile_of(file.environment, file.records))
        emit(f"records: {out}\nprofile of this GPU: {path}; estimates for it use it from now on", err=True)
        _learn_times(file, file.environment.gpu)


def _learn_times(file: RecordFile, product: str) -> None:
    """Keeps the time constants of the card that was measured, or says why they were not learnt."""
    from memplan.timing import profile
    from memplan.units import exact_percent

    try:
        learnt = profile.learn(file)
    except MemplanError as error:
        emit(f"time constants stay as they were: {error.message}", err=True)
        return
    path = profile.save(learnt, product)
    median, p90 = (exact_percent(learnt.held_out[name], 0) for name in ("median", "p90"))
    emit(
        f"time constants of this GPU: {path}; `cost` and `plan` use them from now on\n"
        f"their errors on runs left out in turn: median {median}, nine in ten within {p90}",
        err=True,
    )
