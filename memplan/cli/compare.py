"""`memplan compare`: full fine-tuning, LoRA and QLoRA side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli import options
from memplan.cli.estimate import STACKS
from memplan.cli.figures import gib, percent
from memplan.cli.output import display, emit
from memplan.cli.render import bold, heading, line, paragraph, table, verdict, warning
from memplan.units import human

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memplan.compare import Column, Comparison

EPILOG = """Examples:

  memplan compare llama-7b

  memplan compare llama-3.1-8b --rank 64 --seq-len 2048 --variants 50

  memplan compare qwen3-8b --gpu rtx-4090 --json
"""

_SAYS = {"fits": "fits", "close": "close", "does not fit": "no"}
_HEADS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def register(app: typer.Typer, summary: str) -> None:
    app.command("compare", short_help=summary, epilog=EPILOG)(compare)


@options.takes_run(without=("method",))
def compare(
    model: options.Model,
    run: dict[str, Any],
    variants: Annotated[
        int, typer.Option(min=1, help="Fine-tuned models to store.", rich_help_panel=options.OUTPUT)
    ] = 20,
    gpu: options.Gpu = None,
    allocator: options.Allocator = None,
    as_json: options.Json = False,
) -> None:
    """Full fine-tuning, LoRA and QLoRA side by side.

    Options that one of the methods has no use for, such as the rank in full fine-tuning, are left out there.
    """
    from memplan.compare import compare as compare_methods

    comparison = compare_methods(model, run, num_variants=variants, gpu=gpu, allocator=allocator)
    if as_json:
        from memplan.report import CompareReport

        emit(CompareReport.of(comparison).model_dump_json(indent=2))
        return
    display(comparison_lines(comparison))


def comparison_lines(comparison: Comparison) -> Iterator[RenderableType]:
    methods = comparison.columns
    first = methods[0].estimate
    config = first.config
    batch = f"micro-batch {config.micro_batch_size} × {config.seq_len} tokens"
    yield line(bold(first.model.label), f": {batch}, as {STACKS[config.stack]} runs it")
    ranked = methods[1].estimate.config
    targets = ranked.target_modules
    adapted = targets if isinstance(targets, str) else ", ".join(targets)
    yield paragraph(f"rank {ranked.rank} on {adapted}; sizes in GiB", indent=0)
    yield ""
    heads = ("", *(_HEADS[c.estimate.config.method] for c in methods))
    rows = [(label, *map(write, methods)) for label, write in _rows(comparison.num_variants)]
    yield table(rows, "trrr", heads=heads, gap=3)
    yield ""
    yield heading("on common cards", "nothing else on the card; `memplan fit` decides what is close")
    verdicts: list[tuple[RenderableType, ...]] = [
        (gpu.name, f"{gib(gpu.memory_bytes)} GiB", *(verdict(_SAYS[column.verdicts[gpu.name]]) for column in methods))
        for gpu in comparison.gpus
    ]
    yield table(verdicts, "lrrrr", heads=("", *heads), gap=4)
    yield ""
    basis = f"{first.runtime.basis}: {first.runtime.source}"
    beside = f"Beside reserved memory the process holds driver, context and kernels, {basis}"
    yield paragraph(beside, indent=0, style="dim")
    yield from map(warning, dict.fromkeys(w for column in methods for w in column.estimate.warnings))


def _rows(num_variants: int) -> list[tuple[str, Callable[[Column], RenderableType]]]:
    return [
        ("trainable parameters", lambda c: f"{c.estimate.num_trainable_params:,}"),
        ("  of all", lambda c: percent(c.estimate.num_trainable_params, c.estimate.num_params)),
        ("weights", lambda c: gib(c.weight_bytes)),
        ("adapters", lambda c: gib(c.adapter_resident_bytes)),
        ("gradients", lambda c: gib(c.gradient_bytes)),
        ("optimizer states", lambda c: gib(c.optimizer_state_bytes)),
        ("activations and loss at the peak", lambda c: gib(c.activation_bytes)),
        ("peak is in", lambda c: c.estimate.peak_phase),
        ("allocated", lambda c: gib(c.estimate.allocated_bytes)),
        ("reserved", lambda c: gib(c.estimate.reserved_bytes)),
        ("process (of the card)", lambda c: bold(gib(c.estimate.process_bytes))),
        ("  the same in GB", lambda c: f"{c.estimate.process_bytes / 1e9:,.2f}"),
        ("saved", lambda c: human(c.estimate.checkpoint_bytes)),
        (f"disk for {num_variants} variants", lambda c: human(c.storage_bytes(num_variants))),
    ]
