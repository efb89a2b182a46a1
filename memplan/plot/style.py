"""Colours, labels and axes that all pictures share.

The colours are those of Okabe and Ito (jfly.uni-koeln.de/color), told apart by colour-blind readers. In grey some of
them are alike: areas differ by their hatches too, lines by their dashes and markers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from memplan.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = (
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#0072B2", "linestyle": "-.", "marker": "^"},
    {"color": "#009E73", "linestyle": ":", "marker": "D"},
    {"color": "#CC79A7", "linestyle": "-", "marker": "v"},
    {"color": "#E69F00", "linestyle": "--", "marker": "P"},
    {"color": "#56B4E9", "linestyle": "-.", "marker": "X"},
)
LABELS = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def axes_for(ax: Axes | None, *, width: float = 8.0, height: float = 5.0) -> tuple[Figure, Axes]:
    """`ax` and its figure, or a new figure with one pair of axes, which no window belongs to."""
    if ax is not None:
        figure = ax.get_figure()
        assert figure is not None
        return figure.figure, ax  # the root figure, if `ax` lies in a subfigure
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(made)
    return made, made.add_subplot()


def gib_axis(ax: Axes, what: str = "GiB") -> None:
    ax.set_ylabel(what)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", alpha=0.4, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def in_gib(num_bytes: float) -> float:
    return num_bytes / GIB


def foreground() -> str:
    """The colour of text: black, unless the style sheet in use has a dark ground."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def line_styles() -> list[dict[str, str]]:
    """LINES, the first of them in the colour of text."""
    first, *others = LINES
    return [{**first, "color": foreground()}, *(dict(line) for line in others)]


def legend_above(ax: Axes, title: str, *, reverse: bool = False, fontsize: int = 10) -> None:
    """The title, and below it the legend in rows above the axes, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) < 2 and not reverse:
        ax.set_title(title, fontsize=fontsize)
        return
    columns = min(len(labels), 4)
    rows = -(-len(labels) // columns)
    order = slice(None, None, -1) if reverse else slice(None)
    ax.legend(handles[order], labels[order], loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns,
              frameon=False, fontsize=8, handlelength=3, borderaxespad=0.2)  # fmt: skip
    ax.set_title(title, fontsize=fontsize, pad=12 + 14 * rows)


def styled(style: str | None) -> AbstractContextManager[None]:
    """The context of a matplotlib style sheet by name; of none, nothing changes.

    Raises:
        UnknownNameError: no such style.
    """
    import matplotlib.style

    from memplan.errors import UnknownNameError

    if style is not None and style not in matplotlib.style.available:
        raise UnknownNameError("style", style, matplotlib.style.available)
    return matplotlib.style.context(style or {})
