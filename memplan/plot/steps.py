"""One training step from left to right: what is alive when, by component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan.estimate import estimate
from memplan.memory.ledger import sum_tape
from memplan.plot import areas
from memplan.plot.style import axes_for, foreground, gib_axis, in_gib
from memplan.plot.titles import run_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from memplan.estimate import Estimate, ModelLike
    from memplan.train_config import TrainConfig


def timeline(
    model: ModelLike | Estimate,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    ax: Axes | None = None,
    **fields: Any,
) -> Figure:
    """Memory over one step of the steady state, stacked by component, with phases and the peak marked.

    Raises:
        MemplanError: as `estimate`.
    """
    from memplan.estimate import Estimate

    made = model if isinstance(model, Estimate) else estimate(model, config, **fields)
    times, states, phases = step_states(made)
    figure, ax = axes_for(ax, width=10)
    areas.stack(ax, times, states)
    totals = [sum(state.values()) for state in states]
    peak = max(range(len(totals)), key=totals.__getitem__)
    gib_axis(ax, "live tensors, GiB")
    ax.set_ylim(top=in_gib(totals[peak]) * 1.3)
    ax.set_xlim(times[0], times[-1])
    _mark_phases(ax, phases)
    alive = sorted(states[peak].items(), key=lambda item: -item[1])
    large = [f"{areas.named(name)} {in_gib(size):.2f}" for name, size in alive if size >= areas.SMALL * totals[peak]]
    lines = [", ".join(large[i : i + 3]) for i in range(0, len(large), 3)]
    share = (times[peak] - times[0]) / (times[-1] - times[0])
    side, foot = ("left", 0.0) if share < 0.25 else ("right", 1.0) if share > 0.75 else ("center", 0.5)
    ax.annotate(
        "\n".join([f"peak in {made.peak_phase.replace('_', ' ')}: {in_gib(totals[peak]):.2f} GiB", *lines]),
        (times[peak], in_gib(totals[peak])), xytext=(0, 16), textcoords="offset points", fontsize=8, ha=side,
        bbox={"facecolor": ax.get_facecolor(), "edgecolor": "none", "pad": 1},
        arrowprops={"arrowstyle": "-", "color": foreground(), "relpos": (foot, 0)},
    )  # fmt: skip
    ax.set_xlabel("allocations and frees, in the order they happen")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_title(run_title([made]), fontsize=10, pad=24)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _mark_phases(ax: Axes, phases: Sequence[tuple[str, int, int]]) -> None:
    """Dotted lines between phases and their names above the axes, aslant where a phase is too short for its name."""
    first, last = phases[0][1], phases[-1][2]
    free = float(first)
    for phase, begin, end in phases:
        name = phase.replace("_", " ")
        if begin > first:
            ax.axvline(begin, color=foreground(), linewidth=0.6, linestyle=":")
        look: Any = {"ha": "center", "fontsize": 9}
        place = (begin + end) / 2
        if end - begin < _LETTER * len(name) * (last - first):
            look = {"ha": "left", "fontsize": 7, "rotation": 60, "rotation_mode": "anchor"}
            place = max(place, free)
            free = place + 1.8 * _LETTER * (last - first)
        ax.annotate(name, (place, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
                    va="bottom", **look)  # fmt: skip


_LETTER = 0.0105
"""Of the width of the axes, one letter of a phase's name."""


def step_states(made: Estimate) -> tuple[list[int], list[dict[str, int]], list[tuple[str, int, int]]]:
    """Times (events played), bytes alive by component at each, and the phases with their first and last time.

    Each piece of the step gives its highest point and its end.
    """
    program = made.program
    last = max(play.step for play in program.plays)
    live: dict[str, int] = {}
    times, states = [], []
    phases: list[tuple[str, int, int]] = []
    now = 0
    for play in program.plays:
        if not play.tape:
            continue
        summed = sum_tape(play.tape, program.frames[play.frame])
        if play.step == last and play.phase != "load":
            if not phases or phases[-1][0] != play.phase:
                phases.append((play.phase, now, now))
            for share, change in ((0.5, summed.peak), (1.0, summed.net)):
                times.append(now + round(share * len(play.tape)))
                states.append({k: live.get(k, 0) + change.get(k, 0) for k in live.keys() | change.keys()})
            now += len(play.tape)
            phases[-1] = (phases[-1][0], phases[-1][1], now)
        for kind, change_of_kind in summed.net.items():
            live[kind] = live.get(kind, 0) + change_of_kind
    return times, states, phases
