"""Predicted against measured, every run a point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.plot.style import LABELS, LINES, in_gib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from memplan.validation import Validation

TIERS = ("allocated", "reserved", "process")


def predicted_against_measured(validation: Validation) -> Figure:
    """A panel a tier: bytes predicted over bytes measured on the left axes' scale, the error below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(TIERS), height_ratios=(3, 1), sharex="col", squeeze=False)
    methods = sorted({run.method for run in validation.runs})
    for column, tier in enumerate(TIERS):
        top, bottom = axes[0][column], axes[1][column]
        sizes = []
        for style, method in zip(LINES, methods, strict=False):
            rows = validation.rows(tier, [run for run in validation.runs if run.method == method])
            measured = [in_gib(row.measured_bytes) for row in rows]
            look = {"color": style["color"], "marker": style["marker"], "linestyle": "", "markersize": 4, "alpha": 0.7}
            top.plot(measured, [in_gib(row.predicted_bytes) for row in rows], label=LABELS[method], **look)
            bottom.plot(measured, [100 * row.error for row in rows], **look)
            sizes += measured
        if sizes:
            ends = [min(sizes) * 0.8, max(sizes) * 1.2]
            top.plot(ends, ends, color="#888888", linewidth=0.8, zorder=0)
            top.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        summary = validation.comparison.summaries.get(tier)
        title = tier if summary is None else f"{tier}: mean {summary.mean:.2%}, worst {summary.worst:+.1%}"
        top.set_title(title, fontsize=10)
        bottom.axhline(0, color="#888888", linewidth=0.8)
        bottom.set_xlabel("GiB measured")
        for ax in (top, bottom):
            ax.grid(color="#E5E5E5", linewidth=0.5)
            ax.set_axisbelow(True)
    axes[0][0].set_ylabel("GiB predicted")
    axes[1][0].set_ylabel("error, %")
    if methods:
        axes[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{len(validation.runs)} measured runs", fontsize=11)
    return figure
