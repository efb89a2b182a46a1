"""What `memplan validate --json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from memplan.report import Report, Row

if TYPE_CHECKING:
    from memplan.calibration.compare import Summary
    from memplan.traced_runs import TracedRun
    from memplan.validation import Run, Validation


class SummaryReport(Row):
    """Errors of one tier, as shares of the measured bytes; `mean` and `median` of the absolute error."""

    num_runs: int
    mean: float
    median: float
    worst: float
    worst_case_id: str
    bias: float
    num_dangerous: int

    @classmethod
    def of(cls, summary: Summary) -> Self:
        return cls(**{name: getattr(summary, name) for name in cls.model_fields})


class RunRow(Row):
    """One measured run beside its prediction."""

    file: str
    case_id: str
    family: str
    method: str
    stack: str
    measured_peak_phase: str | None
    predicted_peak_phase: str
    measured: dict[str, int]
    predicted: dict[str, int]

    @classmethod
    def of(cls, run: Run) -> Self:
        return cls(
            file=run.file,
            case_id=run.record.case.id,
            family=run.family,
            method=run.method,
            stack=run.stack,
            measured_peak_phase=run.record.peak_phase,
            predicted_peak_phase=run.estimate.peak_phase,
            measured={f"{row.tier}_bytes": row.measured_bytes for row in run.rows},
            predicted={f"{row.tier}_bytes": row.predicted_bytes for row in run.rows},
        )


class TracedRunRow(Row):
    """The components of one run at its allocated peak; measured ones are summed from its allocation trace."""

    file: str
    case_id: str
    phase: str
    measured: dict[str, int]
    predicted: dict[str, int]

    @classmethod
    def of(cls, traced: TracedRun) -> Self:
        return cls(
            file=traced.run.file,
            case_id=traced.run.record.case.id,
            phase=traced.peak.phase,
            measured={f"{row.component}_bytes": row.measured_bytes for row in traced.rows},
            predicted={f"{row.component}_bytes": row.predicted_bytes for row in traced.rows},
        )


class ValidationDocument(Report):
    """`memplan validate --json`."""

    command: Literal["validate"] = "validate"
    num_runs: int
    share_of_right_phases: float | None
    summaries: dict[str, SummaryReport]
    by_method: dict[str, dict[str, SummaryReport]]
    by_family: dict[str, dict[str, SummaryReport]]
    by_stack: dict[str, dict[str, SummaryReport]]
    runs: list[RunRow]
    unpredicted: list[dict[str, str]]
    components: list[TracedRunRow]
    """Of the runs with an allocation trace, where they were asked for."""

    @classmethod
    def of(cls, validation: Validation, traced: Sequence[TracedRun] = ()) -> Self:
        comparison = validation.comparison

        def grouped(key: str) -> Any:
            groups = validation.by(lambda run: str(getattr(run, key)))
            return {name: {tier: SummaryReport.of(s) for tier, s in tiers.items()} for name, tiers in groups.items()}

        return cls(
            num_runs=len(validation.runs),
            share_of_right_phases=validation.share_of_right_phases,
            summaries={tier: SummaryReport.of(s) for tier, s in comparison.summaries.items()},
            by_method=grouped("method"),
            by_family=grouped("family"),
            by_stack=grouped("stack"),
            runs=[RunRow.of(run) for run in validation.runs],
            unpredicted=[{"case_id": u.case_id, "reason": u.reason} for u in comparison.unpredicted],
            components=[TracedRunRow.of(one) for one in traced],
        )
