"""What `memplan fit --json` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from memplan.report import GpuReport, Report, Row, RunReport, run_fields

if TYPE_CHECKING:
    from memplan.fit import FitReport, Suggestion


class SuggestionReport(Row):
    """A change that makes the run fit."""

    flags: str
    fields: dict[str, Any]
    process_bytes: int
    cost: str
    in_place_of: str

    @classmethod
    def of(cls, suggestion: Suggestion) -> Self:
        return cls(
            flags=suggestion.flags,
            fields=dict(suggestion.fields),
            process_bytes=suggestion.process_bytes,
            cost=suggestion.cost,
            in_place_of=suggestion.in_place_of,
        )


class VerdictReport(Row):
    """One run on one card."""

    gpu: GpuReport
    verdict: str
    fits: bool
    capacity_bytes: int
    process_bytes: int
    headroom_bytes: int
    band_bytes: int

    @classmethod
    def of(cls, report: FitReport) -> Self:
        return cls(**_verdict_fields(report))


class FitDocument(RunReport, Report):
    """`memplan fit MODEL --gpu GPU --json`."""

    verdict: str
    fits: bool
    capacity_bytes: int
    headroom_bytes: int
    band_bytes: int
    suggestions: list[SuggestionReport]
    largest: dict[str, int]

    @classmethod
    def of(cls, report: FitReport) -> Self:
        verdict = _verdict_fields(report)
        del verdict["gpu"], verdict["process_bytes"]  # they are among the fields of the run
        return cls(
            **run_fields(report.estimate),
            **verdict,
            suggestions=[SuggestionReport.of(s) for s in report.suggestions],
            largest=dict(report.largest),
        )


class CardsDocument(Report):
    """`memplan fit MODEL --json` without a GPU: common cards."""

    cards: list[VerdictReport]

    @classmethod
    def of(cls, reports: list[FitReport]) -> Self:
        return cls(cards=[VerdictReport.of(report) for report in reports])


def _verdict_fields(report: FitReport) -> dict[str, Any]:
    return {
        "gpu": GpuReport.of(report.gpu),
        "verdict": report.verdict,
        "fits": report.fits,
        "capacity_bytes": report.capacity_bytes,
        "process_bytes": report.process_bytes,
        "headroom_bytes": report.headroom_bytes,
        "band_bytes": report.band_bytes,
    }
