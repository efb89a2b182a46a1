"""One training step from left to right: what is alive when, by component."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memplan.estimate import estimate
from memplan.memory.ledger import sum_tape
from memplan.plot.style import COMPONENT_COLOURS, axes_for, gib_axis, in_gib, run_title

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
    names = [n for n in COMPONENT_COLOURS if any(state.get(n) for state in states)]
    heights = [[in_gib(state.get(name, 0)) for state in states] for name in names]
    ax.stackplot(times, *heights, labels=[n.replace("_", " ") for n in names],
                 colors=[COMPONENT_COLOURS[n] for n in names], linewidth=0)  # fmt: skip
    totals = [sum(state.values()) for state in states]
    peak = max(range(len(totals)), key=totals.__getitem__)
    gib_axis(ax, "GiB of live tensors")
    ax.set_ylim(top=in_gib(totals[peak]) * 1.25)
    ax.set_xlim(times[0], times[-1])
    for phase, begin, end in phases:
        ax.axvline(begin, color="#333333", linewidth=0.6, linestyle=":")
        if end - begin > 0.03 * (times[-1] - times[0]):
            ax.text((begin + end) / 2, in_gib(totals[peak]) * 1.2, phase.replace("_", " "), ha="center", fontsize=9)
    alive = sorted(states[peak].items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {in_gib(size):.2f}" for name, size in alive)
    ax.annotate(
        f"peak {in_gib(totals[peak]):.2f} GiB\n{parts}",
        (times[peak], in_gib(totals[peak])),
        xytext=(0, 14), textcoords="offset points", ha="center", fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "#333333"},
    )  # fmt: skip
    ax.set_xlabel("allocations and frees, in the order they happen")
    ax.set_title(run_title(made), fontsize=10)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


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
