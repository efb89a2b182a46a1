"""Text for a terminal: aligned columns, bars, GiB. At most 80 columns wide, and readable without colour.

Plain strings on purpose: rich costs as long to import as an estimate takes, and a pipe must get the same text.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence

import typer

from memplan.units import GIB

WIDTH = 80
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def emit(text: str, *, err: bool = False) -> None:
    """Writes `text` and a newline to stdout (or stderr), without colour where none is wanted.

    A reader that went away (`| head -1`) is no error, and leaves the exit status as it is.
    """
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    stream = sys.stderr if err else sys.stdout
    try:
        typer.echo(text, err=err, color=False if plain else None)
        stream.flush()
    except BrokenPipeError:
        # What is still buffered must not be flushed into the closed pipe when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def bold(text: str) -> str:
    return typer.style(text, bold=True)


def dim(text: str) -> str:
    return typer.style(text, dim=True)


def heading(text: str, aside: str = "") -> str:
    """A bold line; `aside` in plain type after it."""
    return f"{bold(text)}  {dim(aside)}" if aside else bold(text)


def gib(num_bytes: int) -> str:
    """GiB to two decimals, without the unit (columns carry it); what would print as 0.00 is told from nothing."""
    if num_bytes == 0:
        return "0"
    text = f"{num_bytes / GIB:,.2f}"
    return text if text not in ("0.00", "-0.00") else "<0.01"


def percent(part: float, whole: float) -> str:
    if not whole:
        return ""
    share = 100 * part / whole
    if share >= 10:
        return f"{share:.0f} %"
    if share >= 1:
        return f"{share:.1f} %"
    return f"{share:.2f} %" if share >= 0.01 or not part else "<0.01 %"


def bar(part: float, whole: float, width: int) -> str:
    """A thin bar, `width` columns when `part` is `whole`; as many as `part` is of it otherwise."""
    halves = 0 if whole <= 0 else round(2 * width * min(max(part / whole, 0.0), 1.0))
    return "━" * (halves // 2) + "╸" * (halves % 2)


def visible(text: str) -> int:
    """Columns that `text` takes, colours apart."""
    return len(_ESCAPES.sub("", text))


def columns(rows: Sequence[Sequence[str]], align: str, *, indent: int = 2, gap: int = 2) -> list[str]:
    """Lines of `rows` in columns; `align` has one of `l` or `r` for each."""
    widths = [max((visible(row[i]) for row in rows if i < len(row)), default=0) for i in range(len(align))]
    lines = []
    for row in rows:
        cells = []
        for cell, side, width in zip(row, align, widths, strict=False):
            pad = " " * (width - visible(cell))
            cells.append(pad + cell if side == "r" else cell + pad)
        lines.append((" " * indent + (" " * gap).join(cells)).rstrip())
    return lines


def paragraph(text: str, *, indent: int = 2, first: str = "") -> list[str]:
    """`text` in lines of at most 80 columns; `first` begins the first one."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first or " " * indent,
        subsequent_indent=" " * (len(first) or indent),
        break_on_hyphens=False,
    )


def join(lines: Iterable[str]) -> str:
    return "\n".join(lines)
