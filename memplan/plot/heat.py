"""Memory against two knobs, with what fits on a card as a contour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan import gpus
from memplan.errors import MemplanError
from memplan.plot.style import axes_for, in_gib, run_title
from memplan.sweep import Value, sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memplan.estimate import ModelLike
    from memplan.train_config import TrainConfig


def heat_map(
    model: ModelLike,
    across: tuple[str, Sequence[Value]],
    up: tuple[str, Sequence[Value]],
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    gpu: str | None = None,
    capacities: Sequence[str] = (),
    tier: str = "process",
    ax: Axes | None = None,
    **fields: Any,
) -> Figure:
    """Memory in every cell of two knobs; the border of what fits on each card of `capacities` as a line.

    Raises:
        MemplanError: as `sweep`, and for one knob given twice.
    """
    (x_knob, xs), (y_knob, ys) = across, up
    if x_knob == y_knob:
        raise MemplanError(f"`{x_knob}` goes both across and up", hints=["sweep over two different knobs"])
    swept = sweep(model, {y_knob: ys, x_knob: xs}, config, gpu=gpu, **fields)
    figure, ax = axes_for(ax, width=1.8 + 0.75 * len(xs), height=1.9 + 0.45 * len(ys))
    sizes = [getattr(p.estimate, f"{tier}_bytes") for p in swept.points]
    rows = [sizes[i * len(xs) : (i + 1) * len(xs)] for i in range(len(ys))]
    cells = [[in_gib(size) for size in row] for row in rows]
    image = ax.imshow(cells, origin="lower", aspect="auto", cmap="cividis")
    middle = (max(map(max, cells)) + min(map(min, cells))) / 2
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            ax.text(x, y, f"{cell:.1f}", ha="center", va="center", fontsize=8,
                    color="white" if cell < middle else "black")  # fmt: skip
    for dash, name in zip(("solid", "dashed", "dotted", "dashdot") * 4, capacities, strict=False):
        _border(ax, rows, gpus.get(name).memory_bytes, dash, name)
    ax.set_xticks(range(len(xs)), [f"{v:,}" if isinstance(v, int) else str(v) for v in xs])
    ax.set_yticks(range(len(ys)), [f"{v:,}" if isinstance(v, int) else str(v) for v in ys])
    ax.set_xlabel(x_knob.replace("_", " "))
    ax.set_ylabel(y_knob.replace("_", " "))
    ax.set_title(run_title(swept.points[-1].estimate, without=(x_knob, y_knob)), fontsize=9)
    figure.colorbar(image, ax=ax, label=f"{tier} memory at the peak, GiB")
    if capacities:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, frameon=False, fontsize=8)
    return figure


def _border(ax: Axes, rows: list[list[int]], capacity_bytes: int, dash: str, name: str) -> None:
    """A line along the edges between cells that fit and cells that do not."""
    xs: list[float | None] = []
    ys: list[float | None] = []

    def edge(x0: float, y0: float, x1: float, y1: float) -> None:
        xs.extend((x0, x1, None))
        ys.extend((y0, y1, None))

    fits = [[size <= capacity_bytes for size in row] for row in rows]
    for y, row in enumerate(fits):
        for x, here in enumerate(row):
            if x + 1 < len(row) and row[x + 1] != here:
                edge(x + 0.5, y - 0.5, x + 0.5, y + 0.5)
            if y + 1 < len(fits) and fits[y + 1][x] != here:
                edge(x - 0.5, y + 0.5, x + 0.5, y + 0.5)
    everywhere = all(all(row) for row in fits)
    label = name if xs else f"{name} ({'all fit' if everywhere else 'none fits'})"
    ax.plot([float("nan") if v is None else v for v in xs], [float("nan") if v is None else v for v in ys],
            color="#D55E00", linestyle=dash, linewidth=2.5, label=label)  # fmt: skip
