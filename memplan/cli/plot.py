"""`memplan plot`: memory against a knob or two, or over one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli import options
from memplan.cli.output import emit
from memplan.errors import MemplanError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memplan.gpus import GpuSpec
    from memplan.sweep import Value

EPILOG = """Examples:

  memplan plot llama-7b --over rank=4,8,16,32,64,128,256 -o rank.png

  memplan plot llama-7b --over rank=8,64 --over seq_len=512:8192:x2 -o map.png

  memplan plot llama-7b --over seq_len=512:8192:x2 --capacity l40s -o a.svg

  memplan plot llama-7b --over method=full,lora,qlora --stacked -o methods.pdf

  memplan plot llama-7b --method lora --timeline -o step.png
"""

PICTURE = "Picture"
Over = Annotated[
    list[str] | None,
    typer.Option(metavar="KNOB=VALUES", help="rank=4,8,16 or seq_len=512:8192:x2 or method=lora,qlora; also "
                 "micro_batch_size, model, optimizer and others. Twice for a map.",
                 rich_help_panel=PICTURE, autocompletion=options.complete_knobs),
]  # fmt: skip
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="A line for each, such as lora,qlora.",
        rich_help_panel=PICTURE,
        autocompletion=options.listed(options.complete_methods),
    ),
]
Capacity = Annotated[
    str | None,
    typer.Option(metavar="GPUS", help="Draw the memory of these cards, such as rtx-4090,a100-80gb.",
                 rich_help_panel=PICTURE, autocompletion=options.listed(options.complete_gpus)),
]  # fmt: skip
Tier = Annotated[
    str | None,
    typer.Option(metavar="TIER", help="process, reserved or allocated. Default process.", rich_help_panel=PICTURE,
                 show_default=False, autocompletion=options.complete_tiers),
]  # fmt: skip
Stacked = Annotated[
    bool,
    typer.Option(
        "--stacked", metavar="", help="What is alive at the peak, and what the tier adds.", rich_help_panel=PICTURE
    ),
]
Timeline = Annotated[
    bool, typer.Option("--timeline", metavar="", help="One step from left to right.", rich_help_panel=PICTURE)
]
Style = Annotated[str | None, typer.Option(metavar="NAME", help="A matplotlib style sheet.", rich_help_panel=PICTURE)]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="png, svg or pdf by its suffix; - is stdout, a png.",
                 rich_help_panel=options.OUTPUT),
]  # fmt: skip


def register(app: typer.Typer, summary: str) -> None:
    app.command("plot", short_help=summary, epilog=EPILOG)(plot)


@options.takes_run()
def plot(
    model: options.Model,
    run: dict[str, Any],
    over: Over = None,
    timeline: Timeline = False,
    methods: Methods = None,
    capacity: Capacity = None,
    tier: Tier = None,
    stacked: Stacked = False,
    style: Style = None,
    gpu: options.Gpu = None,
    output: Output = None,
    as_json: options.Json = False,
) -> None:
    """Draws memory against a knob (lines or stacks), two knobs (a map with what fits), or one step."""
    from memplan import gpus
    from memplan.plot.capacity import card_for
    from memplan.plot.lines import TIERS
    from memplan.sweep import parse_over

    knobs = [parse_over(text) for text in over or ()]
    if timeline == bool(knobs) or len(knobs) > 2:
        raise MemplanError("say what to draw", hints=["`--over rank=4,8,16` once or twice, or `--timeline`"])
    for option, given, allowed in (("--methods", methods, (1,)), ("--stacked", stacked, (1,)),
                                   ("--tier", tier, (1, 2)), ("--capacity", capacity, (1, 2))):  # fmt: skip
        if given and len(knobs) not in allowed:
            raise MemplanError(
                f"`{option}` is not for " + ("a map" if knobs else "`--timeline`"),
                hints=["give `--over` once" if allowed == (1,) else "it goes with `--over`"],
            )
    tier = tier or TIERS[0]
    if len({knob for knob, _ in knobs}) < len(knobs):
        raise MemplanError(f"`{knobs[0][0]}` is given twice", hints=["list its values in one `--over`"])
    if tier not in TIERS:
        raise MemplanError(f"`{tier}` is no tier", hints=["one of " + ", ".join(TIERS)])
    if output is None and not as_json:
        raise MemplanError("say where the picture goes", hints=["`-o rank.png`, or `--json` for the numbers"])
    if as_json and str(output) == "-":
        raise MemplanError(
            "`--json` and `-o -` both write to stdout", hints=["give the picture a file, or leave it out"]
        )
    names = tuple(part.strip() for part in methods.split(",") if part.strip()) if methods else ()
    cards = tuple(part.strip() for part in capacity.split(",") if part.strip()) if capacity else ()
    if as_json:
        emit(_document(model, run, knobs, names, card_for(gpu, [gpus.get(name) for name in cards])))
    if output is not None:
        from memplan.plot import save
        from memplan.plot.style import styled

        with styled(style):
            save(_draw(model, run, knobs, names, cards, tier, stacked, gpu), output)
        if str(output) != "-":
            emit(f"wrote {output}", err=True)


def _draw(
    model: str,
    run: dict[str, Any],
    knobs: Sequence[tuple[str, tuple[Value, ...]]],
    methods: tuple[str, ...],
    cards: tuple[str, ...],
    tier: str,
    stacked: bool,
    gpu: str | None,
) -> Figure:
    from memplan import plot as pictures

    if not knobs:
        return pictures.timeline(model, run, gpu=gpu)
    if len(knobs) == 2:
        return pictures.heat_map(model, knobs[0], knobs[1], run, gpu=gpu, capacities=cards, tier=tier)
    (knob, values), *_ = knobs
    return pictures.over(
        model, knob, values, run, methods=methods, gpu=gpu, capacities=cards, tier=tier, stacked=stacked
    )


def _document(
    model: str,
    run: dict[str, Any],
    knobs: Sequence[tuple[str, tuple[Value, ...]]],
    methods: tuple[str, ...],
    gpu: GpuSpec | str | None,
) -> str:
    from memplan.report_plot import SweepDocument, TimelineDocument

    if not knobs:
        from memplan.estimate import estimate

        return TimelineDocument.of(estimate(model, run, gpu=gpu)).model_dump_json(indent=2)
    from memplan.sweep import sweep

    over = {"method": methods, **dict(knobs)} if methods else dict(knobs)
    return SweepDocument.of(sweep(model, over, run, gpu=gpu)).model_dump_json(indent=2)
