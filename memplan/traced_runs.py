"""Measured components beside the predicted ones, for the runs whose allocation trace lies beside their records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from memplan.calibration.components import MADE_UNTRACED, UNTRACED, TracedPeak, traced_peak
from memplan.calibration.trace import read_trace
from memplan.errors import MemplanError
from memplan.estimate import COMPONENTS
from memplan.validation import Run, Validation


@dataclass(frozen=True, slots=True)
class ComponentRow:
    """One component of one run at its allocated peak, in bytes."""

    component: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def difference_bytes(self) -> int:
        return self.predicted_bytes - self.measured_bytes


@dataclass(frozen=True, slots=True)
class TracedRun:
    """The components of one run; those that are nowhere are left out."""

    run: Run
    peak: TracedPeak
    rows: tuple[ComponentRow, ...]

    @property
    def misplaced_bytes(self) -> int:
        """The largest difference of a component."""
        return max((abs(row.difference_bytes) for row in self.rows), default=0)


def traces_of(records: Path) -> Path:
    """The folder of the traces that belong to a record file: `ID.jsonl.gz` for each run that was traced."""
    return records.with_name(records.name + ".traces")


def traced_runs(validation: Validation, files: Iterable[Path]) -> list[TracedRun]:
    """The runs of `files` that have a trace.

    Raises:
        MemplanError: a trace that cannot be read, or that is not whole.
    """
    folders = {path.stem: traces_of(path) for path in files}
    found = []
    for run in validation.runs:
        if run.file not in folders:
            continue
        trace = folders[run.file] / f"{run.record.case.id}.jsonl.gz"
        if trace.exists():
            found.append(_traced(run, trace))
    return found


def _traced(run: Run, trace: Path) -> TracedRun:
    try:
        peak = traced_peak(read_trace(trace))
    except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
        raise MemplanError(f"`{trace}` is not an allocation trace: {error or type(error).__name__}") from error
    except MemplanError as error:
        raise MemplanError(f"`{trace}`: {error.message}", hints=error.hints) from error
    return TracedRun(run, peak, tuple(_rows(run, peak)))


def _rows(run: Run, peak: TracedPeak) -> list[ComponentRow]:
    predicted, measured = dict(run.estimate.components), dict(peak.components)
    if run.record.peak_allocated_bytes is not None:
        measured["allocator_rounding"] = run.record.peak_allocated_bytes - peak.num_bytes
    names: Sequence[str] = COMPONENTS
    if UNTRACED in measured:
        for side in (predicted, measured):
            side[UNTRACED] = sum(side.pop(name, 0) for name in (*MADE_UNTRACED, UNTRACED))
        names = (*COMPONENTS, UNTRACED)
    rows = [ComponentRow(name, predicted.get(name, 0), measured.get(name, 0)) for name in names]
    return [row for row in rows if row.predicted_bytes or row.measured_bytes]
