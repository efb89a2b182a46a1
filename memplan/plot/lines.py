"""Memory against one knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan import gpus
from memplan.errors import MemplanError
from memplan.plot.style import COMPONENT_COLOURS, LABELS, LINES, axes_for, gib_axis, in_gib, run_title
from memplan.sweep import NUMERIC, Point, Value, sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memplan.estimate import ModelLike
    from memplan.train_config import TrainConfig

RANKS = (4, 8, 16, 32, 64, 128, 256)
TIERS = ("process", "reserved", "allocated")


def over_rank(model: ModelLike, ranks: Sequence[int] = RANKS, **more: Any) -> Figure:
    """Memory against LoRA rank, a line each for LoRA and QLoRA. `more` as for `over`."""
    return over(model, "rank", ranks, methods=more.pop("methods", ("lora", "qlora")), **more)


def over(
    model: ModelLike,
    knob: str,
    values: Sequence[Value],
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    methods: Sequence[str] = (),
    gpu: str | None = None,
    capacities: Sequence[str] = (),
    tier: str = "process",
    stacked: bool = False,
    ax: Axes | None = None,
    **fields: Any,
) -> Figure:
    """Memory of a run against `knob`.

    Args:
        methods: a line for each; the config's own unless given.
        capacities: cards whose memory is drawn as a horizontal line.
        tier: `process`, `reserved` or `allocated`.
        stacked: the components at the allocated peak instead of lines (one method).
        ax: draw there; a new figure otherwise.

    Raises:
        MemplanError: as `sweep`; several methods where one is stacked, or where methods are swept over.
    """
    if stacked and methods:
        raise MemplanError("components are stacked for one method", hints=["sweep over `method` to stack several"])
    if knob == "method" and methods:
        raise MemplanError("`method` is swept over already", hints=["leave out the lines by method"])
    swept = sweep(model, {"method": tuple(methods), knob: values} if methods else {knob: values},
                  config, gpu=gpu, **fields)  # fmt: skip
    figure, ax = axes_for(ax)
    numbers = [v for v in values if not isinstance(v, str)] if knob in NUMERIC else []
    places: list[float] = list(numbers) or list(range(len(values)))
    if stacked:
        _stack(ax, places, list(swept.points), grouped=not numbers)
    else:
        for style, method in zip(_styles(), methods or (None,), strict=False):
            points = list(swept.along(knob, **({"method": method} if method else {})))
            heights = [in_gib(getattr(p.estimate, f"{tier}_bytes")) for p in points]
            label = LABELS[method] if method else LABELS[points[0].estimate.config.method]
            ax.plot(places, heights, label=label, markersize=5, **style)
    for name in capacities:
        card = gpus.get(name)
        ax.axhline(in_gib(card.memory_bytes), color="#666666", linewidth=1, linestyle=(0, (4, 2)))
        ax.annotate(card.name, (0.01, in_gib(card.memory_bytes)), xycoords=("axes fraction", "data"),
                    ha="left", va="bottom", fontsize=8, color="#444444")  # fmt: skip
    gib_axis(ax, f"{'allocated' if stacked else tier} memory at the peak, GiB")
    ax.set_xlabel(knob.replace("_", " "))
    if len(numbers) > 2 and min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
        ax.set_xscale("log", base=2)
    ax.set_xticks(places, [f"{v:,}" if isinstance(v, int) else str(v) for v in values])
    ax.minorticks_off()
    ax.set_title(run_title(swept.points[-1].estimate, without=(knob, *(("method",) if methods else ()))), fontsize=10)
    if stacked or methods or len(swept.points) > 1:
        handles, labels = ax.get_legend_handles_labels()
        order = slice(None, None, -1) if stacked else slice(None)
        ax.legend(handles[order], labels[order], frameon=False, fontsize=8)
    return figure


def _styles() -> list[dict[str, Any]]:
    return [dict(style) for style in LINES]


def _stack(ax: Axes, places: list[Any], points: list[Point], *, grouped: bool) -> None:
    names = [n for n in COMPONENT_COLOURS if any(p.estimate.components.get(n) for p in points)]
    heights = {n: [in_gib(p.estimate.components.get(n, 0)) for p in points] for n in names}
    if grouped:
        base = [0.0] * len(points)
        for name in names:
            ax.bar(places, heights[name], bottom=base, width=0.6, color=COMPONENT_COLOURS[name],
                   edgecolor="white", linewidth=0.5, label=name.replace("_", " "))  # fmt: skip
            base = [low + high for low, high in zip(base, heights[name], strict=True)]
        return
    ax.stackplot(places, *heights.values(), labels=[n.replace("_", " ") for n in names],
                 colors=[COMPONENT_COLOURS[n] for n in names], edgecolor="white", linewidth=0.5)  # fmt: skip
