"""`memplan estimate`: one run, on one screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli import options
from memplan.cli.render import bar, bold, columns, dim, emit, gib, heading, join, paragraph, percent
from memplan.train_config import ADAPTER_FIELDS, QUANT_FIELDS, TrainConfig
from memplan.units import human

if TYPE_CHECKING:
    from memplan.estimate import Estimate

EPILOG = """Examples:

  memplan estimate llama-7b --method qlora --rank 16

  memplan estimate qwen3-8b --stack trainer --seq-len 2048 --gpu rtx-4090

  memplan estimate ./my-model/config.json --method full --explain
"""

STACKS = {"torch": "a plain PyTorch loop", "trainer": "transformers' Trainer", "trl": "TRL's SFTTrainer"}
_LABELS = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}
_WIDTH_OF_BAR = 36
_SPACE = "\u00a0"  # textwrap does not break at it

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
        from memplan.cli.explain import explanation_text

        emit(explanation_text(result))
        return
    emit(join(estimate_lines(result)))


def title(result: Estimate) -> str:
    """`llama-7b: QLoRA, rank 16, as TRL's SFTTrainer runs it`"""
    config = result.config
    rank = f" rank {config.rank}" if config.trains_adapters else ""
    return f"{bold(result.model.label)}: {_LABELS[config.method]}{rank}, as {STACKS[config.stack]} runs it"


def estimate_lines(result: Estimate) -> Iterator[str]:
    yield title(result)
    yield from count_lines(result)
    yield ""
    yield heading("run", "* not given: as the stack sets it")
    yield from run_lines(result.config)
    yield ""
    yield heading(f"alive at the peak ({result.peak_phase})", "GiB")
    yield from component_lines(result)
    yield ""
    yield heading("peak of each phase", "GiB")
    phases = [f"{name}{_SPACE}{gib(size)}" for name, size in result.phases.items() if name != "zero_grad"]
    yield from _packed(phases, first="  ")
    yield ""
    yield from tier_lines(result)
    for warning in result.warnings:
        yield from paragraph(warning, first="warning: ")


def run_lines(config: TrainConfig) -> Iterator[str]:
    """Every assumption of the run by its option, in the panels of the help; a star where the user said nothing."""
    unused = {
        *(ADAPTER_FIELDS if config.method == "full" else ()),
        *(QUANT_FIELDS if config.method != "qlora" else ()),
    }
    unused |= {"reentrant"} if not config.gradient_checkpointing else set()
    unused |= {"double_quant"} if config.quant_type == "int8" else set()
    for panel, names in options.fields_by_panel().items():
        label = panel.partition(" ")[0].lower()
        said = [_stated(config, name, label) for name in names if name not in unused]
        yield from _packed(said, first=f"  {label:9}  ")


def _packed(items: list[str], *, first: str) -> list[str]:
    """`items` in lines of at most 80 columns, none of them broken."""
    return [line.replace(_SPACE, " ") for line in paragraph(f"{_SPACE}· ".join(items), first=first)]


def _stated(config: TrainConfig, name: str, label: str) -> str:
    option = "" if name == label else name.replace("_", "-") + _SPACE
    return option + _value(getattr(config, name)) + ("" if name in config.model_fields_set else "*")


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def component_lines(result: Estimate) -> list[str]:
    total = result.allocated_bytes
    rows = [
        (name.replace("_", " "), gib(size), percent(size, total), bar(size, total, _WIDTH_OF_BAR))
        for name, size in result.components.items()
    ]
    return [*columns(rows, "lrrl")]


def tier_lines(result: Estimate) -> Iterator[str]:
    """The three tiers, what each is and where its constants come from."""
    runtime = result.runtime
    beside = result.process_bytes - result.reserved_bytes
    process = f"{gib(result.process_bytes)}"
    in_gb = f"({result.process_bytes / 1e9:.2f} GB)"
    yield heading("three tiers, at their peaks", "GiB")
    yield from columns(
        [
            ("allocated", gib(result.allocated_bytes), "live tensors (torch.cuda.max_memory_allocated)"),
            ("reserved", gib(result.reserved_bytes), "the caching allocator's (max_memory_reserved)"),
            (bold("process"), bold(process), f"{in_gb} of the card, the driver's part included"),
        ],
        "lrl",
    )
    source = f"{gib(beside)} beside reserved for driver, context and kernels, {runtime.basis}: {runtime.source}"
    source += "; name your card with --gpu" if result.gpu is None else ""
    yield from (dim(line) for line in paragraph(source))
    if result.gpu is not None:
        gpu = result.gpu
        spare = gpu.memory_bytes - result.process_bytes
        verdict = f"{gib(spare)} GiB to spare" if spare >= 0 else f"{gib(-spare)} GiB short"
        yield f"  {gpu.name} has {gib(gpu.memory_bytes)} GiB: {verdict}"


def count_lines(result: Estimate) -> Iterator[str]:
    """Parameters and what is saved."""
    share = percent(result.num_trainable_params, result.num_params)
    what = "adapter" if result.config.trains_adapters else "checkpoint"
    yield f"{result.num_params:,} parameters, {result.num_trainable_params:,} trained ({share})"
    yield f"saved {what}: {human(result.checkpoint_bytes)}"
