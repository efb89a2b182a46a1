"""Writing a figure where the user wants it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def save(figure: Figure, path: str | Path, *, format_: str = "png") -> None:
    """Writes `figure` to `path` in the format of its suffix, or in `format_` to stdout where the path is `-`.

    Raises:
        MemplanError: another suffix, or a place that cannot be written to.
    """
    if str(path) == "-":
        figure.savefig(sys.stdout.buffer, format=format_)
        return
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise MemplanError(f"`{target}` has no suffix of a picture", hints=["use " + ", ".join(SUFFIXES)])
    try:
        figure.savefig(target)
    except OSError as error:
        raise MemplanError(f"cannot write `{target}`: {error.strerror or error}") from None
