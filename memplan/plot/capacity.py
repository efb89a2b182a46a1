"""What cards have: lines across a picture, and borders of what fits in a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memplan.plot.style import foreground, in_gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memplan.gpus import GpuSpec


def card_for(gpu: str | None, cards: Sequence[GpuSpec]) -> GpuSpec | str | None:
    """Whose driver and workspaces count in a picture: `gpu`, or the only one of `cards`."""
    return cards[0] if gpu is None and len(cards) == 1 else gpu


def draw_lines(ax: Axes, cards: Sequence[GpuSpec]) -> None:
    """What cards have, as horizontal lines named at their right ends; cards of about one size share a name."""
    low, high = ax.get_ylim()
    high = max([high, *(1.04 * in_gib(card.memory_bytes) for card in cards)])
    ax.set_ylim(low, high)
    groups: list[list[GpuSpec]] = []
    for card in sorted(cards, key=lambda card: card.memory_bytes):
        ax.axhline(in_gib(card.memory_bytes), color=foreground(), alpha=0.6, linewidth=1, linestyle=(0, (4, 2)))
        if groups and in_gib(card.memory_bytes - groups[-1][0].memory_bytes) < 0.035 * (high - low):
            groups[-1].append(card)
        else:
            groups.append([card])
    for group in groups:
        middle = in_gib((group[0].memory_bytes + group[-1].memory_bytes) / 2)
        ax.annotate(" " + ",\n ".join(card.name for card in group), (1, middle), xycoords=("axes fraction", "data"),
                    ha="left", va="center", fontsize=8, annotation_clip=False)  # fmt: skip


_WHAT_FITS = "what fits, on the side of the smaller numbers; each card with its own driver"


def draw_borders(ax: Axes, needed: Sequence[tuple[GpuSpec, Sequence[Sequence[int]]]]) -> None:
    """Around the cells whose bytes a card has, a line; cards with the same cells share one, named in a legend.

    Args:
        needed: each card with what the process takes on it, in bytes, a row of cells after the other from below.
    """
    from matplotlib.patheffects import Normal, withStroke

    bordered: dict[tuple[tuple[bool, ...], ...], list[GpuSpec]] = {}
    for card, rows in sorted(needed, key=lambda item: item[0].memory_bytes):
        fits = tuple(tuple(size <= card.memory_bytes for size in row) for row in rows)
        bordered.setdefault(fits, []).append(card)
    dashes = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
    # White on black is seen on every colour of the map, and in grey.
    outline = [withStroke(linewidth=4.5, foreground="black"), Normal()]
    drawn = 0
    for fits, group in bordered.items():
        xs, ys = _edges(fits)
        label = ", ".join(f"{card.name} {in_gib(card.memory_bytes):.1f} GiB" for card in group)
        if not xs:
            label += " (all fit)" if fits[0][0] else " (none fits)"
        ax.plot(xs, ys, color="white", linestyle=dashes[drawn % len(dashes)] if xs else "", linewidth=2.2,
                label=label, path_effects=outline, solid_capstyle="butt", dash_capstyle="butt")  # fmt: skip
        drawn += bool(xs)
    if bordered:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2 if len(bordered) > 1 else 1, frameon=False,
                  fontsize=8, handlelength=4, title=_WHAT_FITS, title_fontsize=8)  # fmt: skip


def _edges(fits: Sequence[Sequence[bool]]) -> tuple[list[float], list[float]]:
    """The edges between cells that fit and cells that do not, with a gap after each."""
    xs: list[float] = []
    ys: list[float] = []

    def edge(x0: float, y0: float, x1: float, y1: float) -> None:
        xs.extend((x0, x1, float("nan")))
        ys.extend((y0, y1, float("nan")))

    for y, row in enumerate(fits):
        for x, here in enumerate(row):
            if x + 1 < len(row) and row[x + 1] != here:
                edge(x + 0.5, y - 0.5, x + 0.5, y + 0.5)
            if y + 1 < len(fits) and fits[y + 1][x] != here:
                edge(x - 0.5, y + 0.5, x + 0.5, y + 0.5)
    return xs, ys
