"""Memory against one knob."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan import gpus
from memplan.errors import MemplanError
from memplan.plot import areas, capacity
from memplan.plot.style import LABELS, axes_for, gib_axis, in_gib, legend_above, line_styles
from memplan.plot.titles import knob_label, run_title, value_label
from memplan.sweep import NUMERIC, Value, sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memplan.estimate import Estimate, ModelLike
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
    """Memory of a run against `knob`, in GiB.

    Args:
        methods: a line for each; the config's own unless given.
        gpu: whose driver and workspaces count; the one card of `capacities` unless given, as for `estimate` if there
            are several.
        capacities: cards whose memory is drawn as a horizontal line.
        tier: `process`, `reserved` or `allocated`.
        stacked: the components at the allocated peak instead of lines, and upon them what the tier adds (one method).
        ax: draw there; a new figure otherwise.

    Raises:
        MemplanError: as `sweep`; no such tier; several methods where one is stacked, or where methods are swept over.
    """
    if stacked and methods:
        raise MemplanError("components are stacked for one method", hints=["sweep over `method` to stack several"])
    if knob == "method" and methods:
        raise MemplanError("`method` is swept over already", hints=["leave out the lines by method"])
    if tier not in TIERS:
        raise MemplanError(f"`{tier}` is no tier", hints=["one of " + ", ".join(TIERS)])
    cards = [gpus.get(name) for name in capacities]
    card = capacity.card_for(gpu, cards)
    swept = sweep(model, {"method": tuple(methods), knob: values} if methods else {knob: values},
                  config, gpu=card, **fields)  # fmt: skip
    figure, ax = axes_for(ax)
    numbers = [v for v in values if not isinstance(v, str)] if knob in NUMERIC else []
    places: list[float] = list(numbers) or list(range(len(values)))
    if stacked:
        areas.stack(ax, places, [up_to(tier, p.estimate) for p in swept.points], bars=len(numbers) < 2)
    else:
        for style, method in zip(line_styles(), methods or (None,), strict=False):
            points = list(swept.along(knob, **({"method": method} if method else {})))
            heights = [in_gib(getattr(p.estimate, f"{tier}_bytes")) for p in points]
            label = LABELS[method] if method else LABELS[points[0].estimate.config.method]
            if not numbers:  # nothing lies between two models or two kernels
                style = {**style, "linestyle": ""}
            ax.plot(places, heights, label=label, markersize=5 if numbers else 9, **style)  # type: ignore[arg-type]
    gib_axis(ax, f"{tier} memory at the peak, GiB")
    capacity.draw_lines(ax, cards)
    ax.set_xlabel(knob_label(knob))
    if len(numbers) > 2 and min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
        ax.set_xscale("log", base=2)
    names = [value_label(value) for value in values]
    turned: Any = {"rotation": 25, "ha": "right"} if sum(map(len, names)) > 80 else {}
    ax.set_xticks(places, names, **turned)
    ax.minorticks_off()
    if not numbers:
        ax.set_xlim(-0.5, len(values) - 0.5)
    varied = (knob, *(("method",) if methods else ()))
    legend_above(ax, run_title([p.estimate for p in swept.points], without=varied), reverse=stacked)
    return figure


def up_to(tier: str, made: Estimate) -> dict[str, int]:
    """What is alive at the allocated peak by component, and what the tiers up to `tier` add to it, in bytes."""
    parts = dict(made.components)
    if tier != "allocated":
        parts["cached by the allocator"] = made.reserved_bytes - made.allocated_bytes
    if tier == "process":
        parts["driver, context, kernels"] = made.beside_reserved_bytes
    return parts
