"""Where text goes: as wide as the terminal, 80 columns in a pipe (or `COLUMNS`), no colour where none is wanted.

rich is imported where it is needed, so that `--json`, errors and completion do without it.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPE, WIDEST = 80, 120
"""Columns of what is no terminal, and the most that are used of one: longer lines are hard to read."""
_IN_ASCII = {"×": "x", "·": "|", "…": "...", "−": "-"}
"""What the letters in memplan's own words become where the encoding lacks them."""
_TRAILING = re.compile(r" +$", re.MULTILINE)


def accept_any_encoding() -> None:
    """Lets stdout and stderr of an encoding that lacks a letter print one like it, or `?`, and not crash."""
    codecs.register_error("memplan.plain", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="memplan.plain")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_IN_ASCII.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def emit(text: str, *, err: bool = False) -> None:
    """Writes `text`, as it is, and a newline to stdout (or stderr).

    A reader that went away (`| head -1`) is no error, and leaves the exit status as it is.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # What is still buffered must not be flushed into the closed pipe when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def display(items: Iterable[RenderableType], *, err: bool = False) -> None:
    """Writes lines, paragraphs and tables one below the other to stdout (or stderr)."""
    emit(rendered(items, err=err), err=err)


def rendered(items: Iterable[RenderableType], *, err: bool = False) -> str:
    """What `display` writes, without the newline at its end."""
    console = _console(err=err)
    with console.capture() as captured:
        for item in items:
            console.print(item, crop=False)
    return _TRAILING.sub("", captured.get()).removesuffix("\n")


def _console(*, err: bool) -> Console:
    from rich.console import Console

    # rich keeps bold and dim under NO_COLOR, and takes the width of a pipe from a terminal at its other end.
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    free = (sys.stderr if err else sys.stdout).isatty() or os.environ.get("COLUMNS", "").isdigit()
    console = Console(
        stderr=err,
        width=None if free else PIPE,
        color_system=None if plain else "auto",
        highlight=False,
        markup=False,
        emoji=False,
    )
    console.width = min(console.width or PIPE, WIDEST)
    return console
