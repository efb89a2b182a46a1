"""Colours, labels and axes that all pictures share.

The colours are those of Okabe and Ito (jfly.uni-koeln.de/color), told apart by colour-blind readers and, in
the order used here, by their lightness in grey; lines also differ by their dashes and markers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from memplan.units import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memplan.estimate import Estimate

COMPONENT_COLOURS = {
    "weights": "#0072B2",
    "adapters": "#56B4E9",
    "gradients": "#D55E00",
    "optimizer_states": "#E69F00",
    "activations": "#009E73",
    "loss": "#CC79A7",
    "temporaries": "#999999",
    "workspaces": "#444444",
    "inputs": "#F0E442",
    "allocator_rounding": "#DDDDDD",
    "runtime": "#111111",
}
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
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def in_gib(num_bytes: float) -> float:
    return num_bytes / GIB


def run_title(made: Estimate, *, without: tuple[str, ...] = ()) -> str:
    """The run in one or two lines; what the picture varies is left out."""
    c = made.config
    parts = [] if "model" in without else [made.model.label]
    if "method" not in without:
        parts.append(LABELS[c.method])
    if c.trains_adapters and "rank" not in without:
        parts.append(f"rank {c.rank}")
    if "micro_batch_size" not in without:
        parts.append(f"micro-batch {c.micro_batch_size}")
    if "seq_len" not in without:
        parts.append(f"{c.seq_len:,} tokens")
    second = [f"stack {c.stack}", f"loss {c.loss}", c.optimizer, c.attention]
    second.append("checkpointing" if c.gradient_checkpointing else "no checkpointing")
    return ", ".join(parts) + "\n" + ", ".join(second)


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
