"""`memplan models`: the bundled models, and `memplan models show NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli import options
from memplan.cli.figures import percent
from memplan.cli.output import display, emit
from memplan.cli.render import UNSURE, bold, heading, paragraph, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memplan.anatomy import Anatomy
    from memplan.model_spec import ModelSpec

EPILOG = """Examples:

  memplan models

  memplan models --family qwen3

  memplan models show llama-3.1-8b
"""


def register(app: typer.Typer, summary: str) -> None:
    group = typer.Typer()
    group.callback(invoke_without_command=True)(list_models)
    group.command("show", epilog=EPILOG)(show)
    app.add_typer(group, name="models", short_help=summary, epilog=EPILOG)


def list_models(
    context: typer.Context,
    family: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Only those of this model_type.", show_default=False)
    ] = None,
    as_json: options.Json = False,
) -> None:
    """The models that are bundled: by name, without a download. Any other works by its config.json."""
    if context.invoked_subcommand is not None:
        return
    from memplan import catalog
    from memplan.errors import UnknownNameError

    specs = catalog.all_specs()
    if family is not None:
        known = {spec.model_type for spec in specs}
        if family not in known:
            raise UnknownNameError("family", family, known, listed_by="memplan models")
        specs = tuple(spec for spec in specs if spec.model_type == family)
    if as_json:
        from memplan.report import ModelReport, ModelsReport

        emit(ModelsReport(models=[ModelReport.of(spec) for spec in specs]).model_dump_json(indent=2))
        return
    heads = ("name", "type", "parameters", "layers", "hidden")
    rows = [
        (s.label, s.model_type, f"{s.num_parameters or 0:,}", str(s.num_hidden_layers), f"{s.hidden_size:,}")
        for s in specs
    ]
    display([table(rows, "llrrr", heads=heads, indent=0)])


def show(model: options.Model, as_json: options.Json = False) -> None:
    """One model taken apart: its sizes, parameters by part, what a layer keeps of a token, pitfalls, and the source."""
    from memplan import catalog
    from memplan.anatomy import anatomy

    spec = catalog.load(model)
    taken_apart = anatomy(spec)
    if as_json:
        from memplan.report import ModelShowReport

        emit(ModelShowReport.of(spec, taken_apart).model_dump_json(indent=2))
        return
    display([*_spec_lines(spec), *_anatomy_lines(taken_apart), *_origin_lines(spec)])


def _spec_lines(spec: ModelSpec) -> Iterator[RenderableType]:
    """What differs from a field's default."""
    apart = ("name", "aliases", "source", "num_parameters", "hf_repo", "notes", "left_out")
    yield bold(spec.label)
    rows = []
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if name not in apart and (field.is_required() or value != field.default):
            rows.append((name, _short(value)))
    yield table(rows, "lt")


def _anatomy_lines(taken_apart: Anatomy) -> Iterator[RenderableType]:
    """Parameters by part, the ledger of one layer, pitfalls."""
    from memplan.anatomy import SEQ_LEN

    parts = taken_apart.parts
    total = sum(parts.values())
    yield ""
    yield heading("parameters", f"{total:,}")
    yield table([(name, f"{count:,}", percent(count, total)) for name, count in parts.items()], "trr")
    yield ""
    yield heading("one layer keeps for backward", f"bytes a token of {SEQ_LEN:,}, rank 16, --stack trl")
    kept = taken_apart.kept_per_token
    rows = [
        (f"{num_layers} × {kind}", *(f"{by_kind[kind]:,}" for by_kind in kept.values()))
        for kind, num_layers in taken_apart.num_layers.items()
    ]
    rows.append(("with gradient checkpointing", *(f"{n:,}" for n in taken_apart.checkpointed_per_token.values())))
    yield table(rows, "trrr", heads=("", *kept))
    yield ""
    for pitfall in taken_apart.pitfalls:
        yield paragraph(pitfall, first="pitfall  ", mark=UNSURE)


def _origin_lines(spec: ModelSpec) -> Iterator[RenderableType]:
    """Other names, source and notes."""
    names = [*spec.aliases, *([spec.hf_repo] if spec.hf_repo else [])]
    if names:
        yield paragraph(", ".join(dict.fromkeys(names)), first="also known as  ")
    if spec.source:
        yield paragraph(spec.source, first="source  ", style="dim")
    for note in (*spec.left_out, *spec.notes):
        yield paragraph(note, first="note  ")


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={held}" for key, held in value.items() if isinstance(held, str | int | bool))
    if not isinstance(value, tuple):
        return str(value)
    kinds = dict.fromkeys(map(str, value))
    if len(value) > 8:
        return ", ".join(f"{sum(str(v) == kind for v in value)} × {kind}" for kind in kinds)
    return ", ".join(map(str, value))
