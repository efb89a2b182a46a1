"""Text of `memplan estimate --explain`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memplan.cli.estimate import tier_lines, title
from memplan.cli.figures import percent
from memplan.cli.render import bold, line, paragraph, table
from memplan.explain import explain
from memplan.units import human

if TYPE_CHECKING:
    from rich.console import RenderableType

    from memplan.estimate import Estimate


def explanation(result: Estimate) -> Iterator[RenderableType]:
    yield title(result)
    yield f"{result.allocated_bytes:,} B allocated at the peak, in {result.peak_phase}; of these are"
    for part in explain(result):
        share = percent(part.num_bytes, result.allocated_bytes)
        yield ""
        yield line(bold(part.name.replace("_", " ")), f"  {human(part.num_bytes)}  {share}")
        yield paragraph(part.formula, first="  = ")
        yield table([(f"{term.num_bytes:,} B", term.text) for term in part.terms], "rt", indent=4, gap=3)
        if part.detail:
            yield paragraph(part.detail, indent=4)
        yield paragraph(f"{part.why} [{part.source}]", style="dim")
    yield ""
    yield from tier_lines(result)
