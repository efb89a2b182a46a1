"""A picture of a plan: dollars against hours, the front, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

from memplan.errors import MemplanError
from memplan.plan import Plan

_COLOURS = {"full": "#4C72B0", "lora": "#DD8452", "qlora": "#55A868"}


def plot_front(plan: Plan, path: str | Path) -> None:
    """Draws `plan` to `path`; the suffix (.png, .svg, .pdf) says the format.

    Raises:
        MemplanError: there is nothing to draw, or the file cannot be written.
    """
    candidates = [c for c in plan.front if c.dollars is not None]
    others = [row.candidate for row in plan.rejected if row.candidate is not None and row.candidate.dollars is not None]
    if not candidates:
        raise MemplanError("nothing to draw: no run fits within the limits")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    try:
        for method, colour in _COLOURS.items():
            behind = [c for c in others if c.method == method]
            axes.scatter([c.hours for c in behind], [c.dollars or 0 for c in behind], color=colour, alpha=0.35, s=24)
            front = [c for c in candidates if c.method == method]
            if front or behind:
                axes.scatter(
                    [c.hours for c in front], [c.dollars or 0 for c in front], color=colour, s=64, label=method
                )
        axes.plot(
            [c.hours for c in candidates], [c.dollars or 0 for c in candidates], color="#888888", linewidth=1, zorder=0
        )
        for c in candidates:
            mark = " (take this)" if c is plan.recommended else ""
            axes.annotate(
                f"{c.gpu}{mark}", (c.hours, c.dollars or 0), xytext=(6, 6), textcoords="offset points", fontsize=9
            )
        shown = {c.gpu for c in candidates}
        for c in sorted(others, key=lambda c: c.dollars or 0):
            if c.gpu not in shown:
                shown.add(c.gpu)
                place = (c.hours, c.dollars or 0)
                axes.annotate(c.gpu, place, xytext=(5, -9), textcoords="offset points", fontsize=7, color="#666666")
        axes.set(xscale="log", yscale="log", xlabel="hours", ylabel="US dollars")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{plan.model}: {plan.num_tokens:,} tokens on one GPU")
        axes.legend(title="method")
        axes.grid(True, which="both", alpha=0.2)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise MemplanError(f"cannot draw to {path}: {error}", hints=["end it in .png, .svg or .pdf"]) from None
    finally:
        pyplot.close(figure)
