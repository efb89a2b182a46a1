"""What is alive, stacked by component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan.plot.style import in_gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AREAS = {
    "weights": ("#0072B2", ""),
    "adapters": ("#56B4E9", ".."),
    "gradients": ("#D55E00", "//"),
    "optimizer_states": ("#E69F00", ""),
    "activations": ("#009E73", "--"),
    "loss": ("#CC79A7", "xx"),
    "temporaries": ("#999999", ""),
    "workspaces": ("#444444", ""),
    "inputs": ("#F0E442", ""),
    "allocator_rounding": ("#DDDDDD", ""),
    "other": ("#666666", ""),
    "cached by the allocator": ("#EEEEEE", "\\\\"),
    "driver, context, kernels": ("#BBBBBB", "oo"),
}
"""Colour and hatch of each component, from the bottom of a stack to its top."""
SMALL = 0.01
"""A component under this share of the highest stack is drawn with the other small ones, as `other`."""


def stack(ax: Axes, places: Sequence[float], states: Sequence[Mapping[str, int]], *, bars: bool = False) -> None:
    """Bytes by component at each of `places` as areas, or as bars, one upon the other."""
    base = [0.0] * len(places)
    for name, sizes in shares_of(states).items():
        colour, hatch = AREAS[name]
        top = [low + in_gib(size) for low, size in zip(base, sizes, strict=True)]
        look: Any = {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3, "label": named(name)}
        if bars:
            ax.bar(places, [high - low for low, high in zip(base, top, strict=True)], bottom=base, width=0.6, **look)
        else:
            ax.fill_between(places, base, top, **look)
        base = top


def shares_of(states: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    """Heights of a stack from the bottom up, a list a component; the small ones are summed as `other`."""
    highest = max(sum(state.values()) for state in states)
    large = [n for n in AREAS if max(state.get(n, 0) for state in states) >= SMALL * highest]
    heights = {name: [state.get(name, 0) for state in states] for name in large}
    others = [sum(size for name, size in state.items() if name not in large) for state in states]
    if any(others):
        heights["other"] = others
    return {name: heights[name] for name in AREAS if name in heights}


def named(component: str) -> str:
    return component.replace("_", " ")
