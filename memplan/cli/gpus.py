"""`memplan gpus`: the cards that are known."""

from __future__ import annotations

from typing import Annotated

import typer

from memplan.cli import options
from memplan.cli.figures import gib
from memplan.cli.output import display, emit
from memplan.cli.render import paragraph, table

EPILOG = """Examples:

  memplan gpus

  memplan gpus --at-least 24GiB

  memplan gpus --json
"""


def register(app: typer.Typer, summary: str) -> None:
    app.command("gpus", short_help=summary, epilog=EPILOG)(gpus)


def gpus(
    at_least: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Only those with this much memory.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """The GPUs that are known: memory as the driver reports it, and dense peaks.

    Flops are of tensor cores with fp32 accumulation, without sparsity; a dash is what no source was found for.
    """
    from memplan.gpu_table import ROWS
    from memplan.units import parse_size

    least = parse_size(at_least) if at_least is not None else 0
    rows = [row for row in ROWS if row.memory_bytes >= least]
    if as_json:
        from memplan.report import GpuReport, GpusReport

        emit(GpusReport(gpus=[GpuReport.of(row) for row in rows]).model_dump_json(indent=2))
        return
    heads = ("name", "GiB", "GB/s", "bf16 TFLOPS", "fp32", "watts", "generation")
    cells = [
        (
            row.name,
            gib(row.memory_bytes),
            _scaled(row.bandwidth_bytes_per_s, 1e9),
            _scaled(row.bf16_flops, 1e12),
            _scaled(row.fp32_flops, 1e12),
            _scaled(row.tdp_watts, 1),
            row.generation,
        )
        for row in rows
    ]
    note = paragraph("Memory is what the driver reports. `--json` has each row's source.", indent=0)
    display([table(cells, "lrrrrrl", heads=heads, indent=0), "", note])


def _scaled(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.0f}"
