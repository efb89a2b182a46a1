"""`memplan estimate`: one run, on one screen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli import options
from memplan.cli.figures import gib, percent
from memplan.cli.output import display, emit
from memplan.cli.render import BAD, GOOD, bar, bold, heading, line, packed, paragraph, table, warning
from memplan.train_config import ADAPTER_FIELDS, QUANT_FIELDS, TrainConfig
from memplan.units import human

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from memplan.estimate import Estimate

EPILOG = """Examples:

  memplan estimate llama-7b --method qlora --rank 16

  memplan estimate qwen3-8b --stack trainer --seq-len 2048 --gpu rtx-4090

  memplan estimate ./my-model/config.json --method full --explain
"""

STACKS = {"torch": "a plain PyTorch loop", "trainer": "transformers' Trainer", "trl": "TRL's SFTTrainer"}
_LABELS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}

Explain = Annotated[
    bool,
    typer.Option(
        "--explain", metavar="", help="Each part's formula with this run's numbers.", rich_help_panel=options.OUTPUT
    ),
]


def register(app: typer.Typer, summary: str) -> None:
    app.command("estimate", short_help=summary, epilog=EPILOG)(estimate)


@options.takes_run()
def estimate(
    model: options.Model,
    run: dict[str, Any],
    gpu: options.Gpu = None,
    allocator: options.Allocator = None,
    explain: Explain = False,
    as_json: options.Json = False,
) -> None:
    """What a run takes: the peak, when it is, what is alive there, in three tiers.

    What is not given is set as the stack sets it, and shown with a star.
    """
    from memplan.estimate import estimate as estimate_run

    result = estimate_run(model, run, gpu=gpu, allocator=allocator)
    if as_json:
        from memplan.report import EstimateReport

        emit(EstimateReport.of(result, explained=explain).model_dump_json(indent=2))
        return
    if explain:
        from memplan.cli.explain import explanation

        display(explanation(result))
        return
    display(estimate_lines(result))


def title(result: Estimate) -> Text:
    """`llama-7b: QLoRA, rank 16, as TRL's SFTTrainer runs it`"""
    config = result.config
    rank = f" rank {config.rank}" if config.trains_adapters else ""
    said = f": {_LABELS[config.method]}{rank}, as {STACKS[config.stack]} runs it"
    return line(bold(result.model.label), said)


def estimate_lines(result: Estimate) -> Iterator[RenderableType]:
    yield title(result)
    yield from count_lines(result)
    yield ""
    yield heading("run", "* not given: as the stack sets it")
    yield run_table(result.config)
    yield ""
    yield heading(f"alive at the peak ({result.peak_phase})", "GiB")
    yield component_table(result)
    yield ""
    yield heading("peak of each phase", "GiB")
    phases = (f"{name} {gib(size)}" for name, size in result.phases.items() if name != "zero_grad")
    yield table([(packed(phases),)], "t")
    yield ""
    yield from tier_lines(result)
    yield from map(warning, result.warnings)


def run_table(config: TrainConfig) -> RenderableType:
    """Every assumption of the run by its option, in the panels of the help; a star where the user said nothing."""
    unused = {
        *(ADAPTER_FIELDS if config.method == "full" else ()),
        *(QUANT_FIELDS if config.method != "qlora" else ()),
    }
    unused |= {"reentrant"} if not config.gradient_checkpointing else set()
    unused |= {"double_quant"} if config.quant_type == "int8" else set()
    panels = {panel.partition(" ")[0].lower(): names for panel, names in options.fields_by_panel().items()}
    return table([(label, packed(_stated(config, label, names, unused))) for label, names in panels.items()], "lt")


def _stated(config: TrainConfig, label: str, names: Iterable[str], unused: set[str]) -> Iterator[str]:
    for name in names:
        if name not in unused:
            option = "" if name == label else name.replace("_", "-") + " "
            yield option + _value(getattr(config, name)) + ("" if name in config.model_fields_set else "*")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def component_table(result: Estimate) -> RenderableType:
    total = result.allocated_bytes
    rows = [
        (name.replace("_", " "), gib(size), percent(size, total), bar(size, total))
        for name, size in result.components.items()
    ]
    return table(rows, "lrrb")


def tier_lines(result: Estimate) -> Iterator[RenderableType]:
    """The three tiers, what each is and where its constants come from."""
    runtime = result.runtime
    beside = result.process_bytes - result.reserved_bytes
    process = f"{gib(result.process_bytes)}"
    in_gb = f"({result.process_bytes / 1e9:.2f} GB)"
    yield heading("three tiers, at their peaks", "GiB")
    yield table(
        [
            ("allocated", gib(result.allocated_bytes), "live tensors (torch.cuda.max_memory_allocated)"),
            ("reserved", gib(result.reserved_bytes), "the caching allocator's (max_memory_reserved)"),
            (bold("process"), bold(process), f"{in_gb} of the card, the driver's part included"),
        ],
        "lrt",
    )
    source = f"{gib(beside)} beside reserved for driver, context and kernels, {runtime.basis}: {runtime.source}"
    source += "; name your card with --gpu" if result.gpu is None else ""
    yield paragraph(source, style="dim")
    if result.gpu is not None:
        gpu = result.gpu
        spare = gpu.memory_bytes - result.process_bytes
        said = (f"{gib(spare)} GiB to spare", GOOD) if spare >= 0 else (f"{gib(-spare)} GiB short", BAD)
        yield line(f"  {gpu.name} has {gib(gpu.memory_bytes)} GiB: ", said)


def count_lines(result: Estimate) -> Iterator[str]:
    """Parameters and what is saved."""
    share = percent(result.num_trainable_params, result.num_params)
    what = "adapter" if result.config.trains_adapters else "checkpoint"
    yield f"{result.num_params:,} parameters, {result.num_trainable_params:,} trained ({share})"
    yield f"saved {what}: {human(result.checkpoint_bytes)}"
