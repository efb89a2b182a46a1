"""Text of `memplan estimate --explain`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memplan.cli.estimate import tier_lines, title
from memplan.cli.render import bold, dim, join, paragraph, percent
from memplan.explain import explain
from memplan.units import human

if TYPE_CHECKING:
    from memplan.estimate import Estimate


def explanation_text(result: Estimate) -> str:
    return join(_lines(result))


def _lines(result: Estimate) -> Iterator[str]:
    yield title(result)
    yield f"{result.allocated_bytes:,} B allocated at the peak, in {result.peak_phase}; of these are"
    for part in explain(result):
        share = percent(part.num_bytes, result.allocated_bytes)
        yield ""
        yield f"{bold(part.name.replace('_', ' '))}  {human(part.num_bytes)}  {share}"
        yield from paragraph(part.formula, first="  = ")
        width = max(len(f"{term.num_bytes:,}") for term in part.terms)
        for term in part.terms:
            yield from paragraph(term.text, first=f"    {term.num_bytes:>{width},} B   ")
        if part.detail:
            yield from paragraph(part.detail, indent=4)
        yield from (dim(line) for line in paragraph(f"{part.why} [{part.source}]"))
    yield ""
    yield from tier_lines(result)
