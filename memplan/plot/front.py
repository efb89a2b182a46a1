"""A picture of a plan: dollars against hours, the front, and what it leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.errors import MemplanError
from memplan.plot.style import LABELS, LINES, axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memplan.plan import Plan
    from memplan.plan_search import Candidate


def plan_front(plan: Plan, *, ax: Axes | None = None) -> Figure:
    """The figure of `plan`: one point a GPU and method, those of the front large, joined and named.

    Raises:
        MemplanError: no run fits within the limits.
    """
    if not plan.front:
        raise MemplanError("nothing to draw: no run fits within the limits")
    others = [row.candidate for row in plan.rejected if row.candidate is not None and row.candidate.dollars is not None]
    figure, axes = axes_for(ax)
    for (method, label), look in zip(LABELS.items(), LINES, strict=False):
        behind = [c for c in others if c.method == method]
        chosen = [c for c in plan.front if c.method == method]
        axes.scatter(*_places(behind), color=look["color"], marker=look["marker"], alpha=0.3, s=24)
        if chosen or behind:
            axes.scatter(*_places(chosen), color=look["color"], marker=look["marker"], s=64, label=label)
    axes.plot(*_places(plan.front), color="#888888", linewidth=1, zorder=0, label="nothing beats these; pale: beaten")
    _name_points(axes, plan, others)
    _logarithmic(axes)
    axes.set_xlabel("hours")
    axes.set_ylabel("US dollars")
    axes.set_title(f"{plan.model}: {plan.num_tokens:,} tokens on one GPU")
    axes.legend()
    return figure


def _places(candidates: list[Candidate] | tuple[Candidate, ...]) -> tuple[list[float], list[float]]:
    return [c.hours for c in candidates], [c.dollars or 0.0 for c in candidates]


def _name_points(axes: Axes, plan: Plan, others: list[Candidate]) -> None:
    """Every row of the front by name, every other GPU once, at its cheapest."""
    for c in plan.front:
        mark = " (take this)" if c is plan.recommended else ""
        place = c.hours, c.dollars or 0.0
        axes.annotate(f"{c.gpu}{mark}", place, xytext=(6, 6), textcoords="offset points", fontsize=9)
    named = {c.gpu for c in plan.front}
    for c in sorted(others, key=lambda c: (c.dollars or 0.0, c.gpu, c.method)):
        if c.gpu not in named:
            named.add(c.gpu)
            place = c.hours, c.dollars or 0.0
            axes.annotate(c.gpu, place, xytext=(5, -9), textcoords="offset points", fontsize=7, color="#666666")


def _logarithmic(axes: Axes) -> None:
    """Logarithmic axes with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
