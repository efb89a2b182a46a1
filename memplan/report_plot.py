"""What `memplan plot --json` prints: the numbers behind the picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from memplan.report import Report, Row

if TYPE_CHECKING:
    from memplan.estimate import Estimate
    from memplan.sweep import Sweep


class PointReport(Row):
    """One value of each knob and what the run then takes."""

    values: list[int | float | str]
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    peak_phase: str
    components: dict[str, int]


class SweepDocument(Report):
    """`memplan plot MODEL --over KNOB=VALUES --json`."""

    command: Literal["plot"] = "plot"
    knobs: list[str]
    points: list[PointReport]

    @classmethod
    def of(cls, swept: Sweep) -> Self:
        points = [
            PointReport(
                values=list(point.values),
                allocated_bytes=point.estimate.allocated_bytes,
                reserved_bytes=point.estimate.reserved_bytes,
                process_bytes=point.estimate.process_bytes,
                peak_phase=point.estimate.peak_phase,
                components=point.estimate.components,
            )
            for point in swept.points
        ]
        return cls(knobs=list(swept.knobs), points=points)


class PhaseReport(Row):
    """A phase of the step by the numbers of its first and last event."""

    name: str
    first_event: int
    last_event: int


class MomentReport(Row):
    """What is alive after so many allocations and frees."""

    event: int
    components: dict[str, int]


class TimelineDocument(Report):
    """`memplan plot MODEL --timeline --json`."""

    command: Literal["plot"] = "plot"
    phases: list[PhaseReport]
    moments: list[MomentReport]

    @classmethod
    def of(cls, made: Estimate) -> Self:
        from memplan.plot.steps import step_states

        times, states, phases = step_states(made)
        return cls(
            phases=[PhaseReport(name=n, first_event=first, last_event=last) for n, first, last in phases],
            moments=[
                MomentReport(event=time, components={k: v for k, v in state.items() if v})
                for time, state in zip(times, states, strict=True)
            ],
        )
