"""Memory against two knobs, with what fits on cards as borders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan import gpus
from memplan.compare import played_on
from memplan.errors import MemplanError
from memplan.plot import capacity
from memplan.plot.lines import TIERS
from memplan.plot.style import axes_for, in_gib
from memplan.plot.titles import knob_label, run_title, value_label
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
    """Memory in every cell of two knobs, in GiB; the border of what fits on each card of `capacities` as a line.

    A cell is within a border if its process, with the driver and workspaces of that card, fits into the card's memory,
    whatever `tier` the numbers are of. The numbers are of `gpu`; unless given, as in `over`.

    Raises:
        MemplanError: as `sweep`, no such tier, and for one knob given twice.
    """
    (x_knob, xs), (y_knob, ys) = across, up
    if x_knob == y_knob:
        raise MemplanError(f"`{x_knob}` goes both across and up", hints=["sweep over two different knobs"])
    if tier not in TIERS:
        raise MemplanError(f"`{tier}` is no tier", hints=["one of " + ", ".join(TIERS)])
    cards = [gpus.get(name) for name in capacities]
    card = capacity.card_for(gpu, cards)
    swept = sweep(model, {y_knob: ys, x_knob: xs}, config, gpu=card, **fields)
    figure, ax = axes_for(ax, width=max(6.4, 2.2 + 0.75 * len(xs)), height=2.6 + 0.45 * len(ys))

    def rows(sizes: Sequence[int]) -> list[Sequence[int]]:
        return [sizes[i * len(xs) : (i + 1) * len(xs)] for i in range(len(ys))]

    cells = [
        [in_gib(size) for size in row] for row in rows([getattr(p.estimate, f"{tier}_bytes") for p in swept.points])
    ]
    image = ax.imshow(cells, origin="lower", aspect="auto", cmap="cividis")
    middle = (max(map(max, cells)) + min(map(min, cells))) / 2
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            ax.text(x, y, f"{cell:.1f}", ha="center", va="center", fontsize=8,
                    color="white" if cell < middle else "black")  # fmt: skip
    ax.set_xticks(range(len(xs)), [value_label(v) for v in xs])
    ax.set_yticks(range(len(ys)), [value_label(v) for v in ys])
    ax.set_xlabel(knob_label(x_knob))
    ax.set_ylabel(knob_label(y_knob))
    runs = [p.estimate for p in swept.points]
    on_card: dict[str, list[int]] = {card.name: [] for card in cards}
    for run in runs:
        for here, played, beside in played_on(run, cards):
            on_card[here.name].append(played.reserved_bytes + beside)
    capacity.draw_borders(ax, [(card, rows(on_card[card.name])) for card in cards])
    ax.set_title(run_title(runs, without=(x_knob, y_knob)), fontsize=9)
    figure.colorbar(image, ax=ax, label=f"{tier} memory at the peak, GiB")
    return figure
