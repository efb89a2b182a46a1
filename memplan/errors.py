"""What memplan raises for its user. Everything else that escapes is a bug.

MemplanError            one `error:` line, `hint:` lines, exit code 2
├── UnknownNameError    a name that no table holds; suggests the nearest ones
│   └── NotModelledError  a family that exists and is not modelled; names the nearest that is
└── InvalidSpecError    a model file or config that cannot be read
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_SHOWN = 60


def shortened(text: str) -> str:
    """`text` as an error repeats it: its beginning, where it is long."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def in_one_line(text: str) -> str:
    """`text` with what would break the line, or move the cursor, written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class MemplanError(ValueError):
    """A mistake in the input, said in one line, with what to do about it in `hints`."""

    def __init__(self, message: str, *, hints: Iterable[str] = ()) -> None:
        self.message = in_one_line(message)
        self.hints = tuple(in_one_line(hint) for hint in hints)
        super().__init__(self.message)


class UnknownNameError(MemplanError):
    """`name` is not one of `known`; the nearest known names become the hint."""

    def __init__(self, kind: str, name: str, known: Iterable[str], *, listed_by: str | None = None) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.5)
        hints = []
        if near:
            hints.append("did you mean " + " or ".join(f"`{n}`" for n in near) + "?")
        elif len(names) <= 12 or not listed_by:
            hints.append("known: " + ", ".join(names))
        if listed_by:
            hints.append(f"`{listed_by}` lists them")
        super().__init__(f"unknown {kind} `{shortened(name)}`", hints=hints)
        self.near = tuple(near)


class NotModelledError(UnknownNameError):
    """A family that exists and that memplan has no operations for; `near` holds the nearest that it has."""

    def __init__(self, message: str, nearest: str) -> None:
        hint = f"the nearest family is `{nearest}`: `memplan models --family {nearest}` lists its models"
        MemplanError.__init__(self, message, hints=[hint])
        self.near = (nearest,)


class InvalidSpecError(MemplanError):
    """A model description that is broken, contradictory or of no known family."""
