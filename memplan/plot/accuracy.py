"""Predicted against measured, every run a point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from memplan.plot.style import LABELS, in_gib, line_styles
from memplan.units import exact_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memplan.validation import Run, Validation

TIERS = ("allocated", "reserved", "process")
_EXACT = 0.01
"""Errors within so many per cent are drawn on a linear scale, larger ones on a logarithmic one."""


def predicted_against_measured(validation: Validation) -> Figure:
    """A panel a tier: bytes predicted over bytes measured, in GiB, and below it the error in per cent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(TIERS), height_ratios=(2, 1), sharex="col", sharey="row", squeeze=False)
    for column, tier in enumerate(TIERS):
        top, bottom = axes[0][column], axes[1][column]
        _points(top, bottom, validation, tier)
        summary = validation.comparison.summaries.get(tier)
        if summary is not None:
            mean, worst = exact_percent(summary.mean, 2), exact_percent(summary.worst, 1, sign="+")
            top.set_title(f"{tier}\n{summary.num_runs} runs: mean {mean}, worst {worst}", fontsize=10)
    axes[0][0].set_ylabel("predicted, GiB")
    axes[1][0].set_ylabel("error, %")
    labels = axes[0][0].get_legend_handles_labels()[1]
    if labels:
        axes[0][0].legend(frameon=False, fontsize=8)
    cards = sorted({run.estimate.gpu.name for run in validation.runs if run.estimate.gpu is not None})
    on = f" on {', '.join(cards)}" if cards else ""
    figure.suptitle(f"{len(validation.runs)} measured training steps{on}", fontsize=11)
    return figure


def _points(top: Axes, bottom: Axes, validation: Validation, tier: str) -> None:
    sizes: list[float] = []
    for label, runs, look in _groups(validation):
        rows = validation.rows(tier, runs)
        measured = [in_gib(row.measured_bytes) for row in rows]
        top.plot(measured, [in_gib(row.predicted_bytes) for row in rows], label=label, **look)
        bottom.plot(measured, [100 * row.error for row in rows], **look)
        sizes += measured
    if sizes:
        ends = (min(sizes) * 0.8, max(sizes) * 1.2)
        top.plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
        top.set(xscale="log", yscale="log", xlim=ends)
    bottom.set_yscale("symlog", linthresh=_EXACT, linscale=0.5)
    bottom.set_yticks([-10, -1, -0.1, 0, 0.1, 1, 10], ["-10", "-1", "-0.1", "0", "+0.1", "+1", "+10"])
    bottom.set_ylim(-60, 60)
    bottom.axhline(0, color="#888888", linewidth=0.8)
    bottom.set_xlabel("measured, GiB")
    for ax in (top, bottom):
        ax.minorticks_off()
        ax.grid(alpha=0.4, linewidth=0.5)
        ax.set_axisbelow(True)
    for axis in (top.xaxis, top.yaxis, bottom.xaxis):
        axis.set_major_formatter("{x:g}")


def _groups(validation: Validation) -> Iterator[tuple[str, list[Run], dict[str, Any]]]:
    """The runs of each method under one look; an int8 base, which depends on the data, stands apart."""
    styles = iter(line_styles())
    for method in LABELS:
        runs = [run for run in validation.runs if run.method == method]
        for int8 in (False, True):
            chosen = [run for run in runs if (run.base == "int8") == int8]
            if chosen:
                style = next(styles)
                look = {"color": style["color"], "marker": style["marker"], "linestyle": "", "markersize": 4}
                look |= {"alpha": 0.7} if not int8 else {"fillstyle": "none", "markersize": 6}
                yield LABELS[method] + (", int8 base" if int8 else ""), chosen, look
