"""`memplan models`: the bundled models, and `memplan models show NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli import options
from memplan.cli.render import bold, columns, dim, emit, join, paragraph

if TYPE_CHECKING:
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
    rows = [(bold("name"), "type", "parameters", "layers", "hidden")]
    rows += [
        (s.label, s.model_type, f"{s.num_parameters or 0:,}", str(s.num_hidden_layers), f"{s.hidden_size:,}")
        for s in specs
    ]
    emit(join(columns(rows, "llrrr", indent=0)))


def show(model: options.Model, as_json: options.Json = False) -> None:
    """What memplan knows of one model, in the names of its config.json, and where that comes from."""
    from memplan import catalog

    spec = catalog.load(model)
    if as_json:
        from memplan.report import ModelShowReport

        emit(ModelShowReport(model=spec.model_dump(mode="json")).model_dump_json(indent=2))
        return
    emit(join(_spec_lines(spec)))


def _spec_lines(spec: ModelSpec) -> Iterator[str]:
    """What differs from a field's default, then names, source and notes."""
    apart = ("name", "aliases", "source", "num_parameters", "hf_repo", "notes")
    yield bold(spec.label)
    rows = []
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if name not in apart and (field.is_required() or value != field.default):
            rows.append((name, _short(value)))
    yield from columns(rows, "ll")
    if spec.num_parameters:
        yield f"parameters  {spec.num_parameters:,}"
    names = [*spec.aliases, *([spec.hf_repo] if spec.hf_repo else [])]
    if names:
        yield from paragraph(", ".join(dict.fromkeys(names)), first="also known as  ")
    if spec.source:
        yield from (dim(line) for line in paragraph(spec.source, first="source  "))
    for note in spec.notes:
        yield from paragraph(note, first="note  ")


def _short(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    kinds = dict.fromkeys(map(str, value))
    if len(value) > 8:
        return ", ".join(f"{sum(str(v) == kind for v in value)} × {kind}" for kind in kinds)
    return ", ".join(map(str, value))
