"""What terminals and pipes are shown, out of rich's parts: lines, paragraphs, tables, bars.

rich is imported where something is laid out, so that `--json` and errors do without it. Colours are of the 16 that a
terminal's theme sets, those that read on white as on black; all that they say, words say too.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.measure import Measurement
    from rich.text import Text

NO_BREAK = "\u00a0"
"""The space that no line is broken at."""
_LEAST = {"t": 20, "b": 4}
"""Columns that text and bars keep in a terminal that is too narrow."""
GOOD, BAD, UNSURE, BAR = "green", "red", "magenta", "cyan"
STYLES = {"fits": GOOD, "does not fit": BAD, "too close to call": UNSURE, "close": UNSURE, "no": "dim"}


def line(*parts: str | Text | tuple[str, str]) -> Text:
    """One line of parts, each plain, styled, or with its style."""
    from rich.text import Text

    return Text.assemble(*parts)


def bold(text: str) -> Text:
    return line((text, "bold"))


def dim(text: str) -> Text:
    return line((text, "dim"))


def heading(text: str, aside: str = "") -> Text:
    """A bold line; `aside` fainter after it."""
    return line((text, "bold"), *(("  ", (aside, "dim")) if aside else ()))


def verdict(text: str, *, style: str = "") -> Text:
    """Whether a run fits, in its colour."""
    return line((text, f"{STYLES[text]} {style}"))


def bar(part: float, whole: float, style: str = BAR) -> RenderableType:
    """A bar that fills its column when `part` is `whole`; as much of it as `part` is of it otherwise."""
    from rich.progress_bar import ProgressBar

    return ProgressBar(
        total=whole, completed=part, style="dim bright_black", complete_style=style, finished_style=style
    )


def table(
    rows: Iterable[Sequence[RenderableType]], columns: str, *, heads: Sequence[str] = (), indent: int = 2, gap: int = 2
) -> RenderableType:
    """`rows` in `columns`: `l` labels and `r` numbers, never broken or cut; `t` text that wraps; `b` bars."""
    from rich.table import Table

    rows = list(rows)
    made = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=bool(heads), header_style="bold")
    least = indent + gap * (len(columns) - 1)
    for index, kind in enumerate(columns):
        whole = kind in "lr"
        longest = max((len(str(row[index])) for row in (heads, *rows) if row), default=0) if whole else None
        made.add_column(
            heads[index] if heads else "",
            justify="right" if kind == "r" else "left",
            no_wrap=whole,
            min_width=longest,
            overflow="fold",
        )
        least += _LEAST[kind] if longest is None else longest
    for row in rows:
        made.add_row(*row)
    return _Uncut(made, indent, least)


def paragraph(text: str, *, indent: int = 2, first: str = "", style: str = "", mark: str = "") -> RenderableType:
    """`text` in lines as wide as there is room; `first` begins the first one, in the style `mark`."""
    return _Prose(text, first or " " * indent, " " * (len(first) or indent), style, mark)


def command(text: str, *, first: str) -> RenderableType:
    """A shell command that can be copied whole: lines end with a backslash, and an option stays beside its value."""
    return _Prose(re.sub(r"(?<= )(--\S+) (?!-)", rf"\1{NO_BREAK}", text), first, " " * len(first), "", "", " \\")


def warning(text: str) -> RenderableType:
    return paragraph(text, first="warning: ", mark=UNSURE)


def packed(items: Iterable[str]) -> RenderableType:
    """`items` in lines as wide as there is room, none of them broken."""
    return _Prose(f"{NO_BREAK}· ".join(item.replace(" ", NO_BREAK) for item in items), "", "", "", "")


class _Prose:
    """Words in lines; textwrap, because rich has neither a hanging indent nor a space that it does not break at."""

    def __init__(self, text: str, first: str, others: str, style: str, mark: str, joint: str = "") -> None:
        self.text, self.first, self.others, self.style, self.mark = text, first, others, style, mark
        self.joint = joint
        """What ends every line but the last."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        lines = textwrap.wrap(
            self.text,
            max(options.max_width, len(self.others) + 20) - len(self.joint),
            initial_indent=self.first,
            subsequent_indent=self.others,
            break_on_hyphens=False,
        )
        for number, text in enumerate(lines):
            joint = self.joint if number < len(lines) - 1 else ""
            made = line((text.replace(NO_BREAK, " ") + joint, self.style))
            made.no_wrap, made.overflow = True, "ignore"
            if number == 0 and self.mark:
                made.stylize(self.mark, 0, len(self.first))
            yield made

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        longest = max(map(len, self.text.split(" ")))
        return Measurement(min(longest, options.max_width), min(len(self.text), options.max_width))


class _Uncut:
    """A table that runs over the edge of a terminal that is too narrow for its figures, where rich would cut them."""

    def __init__(self, table: RenderableType, indent: int, least: int) -> None:
        self.table, self.indent, self.least = table, indent, least

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding

        width = max(self.least, options.max_width)
        yield from console.render(Padding(self.table, (0, 0, 0, self.indent)), options.update(width=width))
