"""Steps measured on an H200 before memplan could predict them, replayed: every row, every phase, every tier.

`tests/data/measured` is kept apart from the records that memplan ships: no formula was fitted to it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from memplan.calibration.record import PhaseFigures
from memplan.memory.simulate import PhaseMemory
from memplan.validation import Run, validate

FILES = sorted((Path(__file__).parent / "data" / "measured").glob("*.jsonl"))
TOLERANCES = {"allocated": 0.001, "reserved": 0.005, "process": 0.005}
PHASE_TOLERANCE = 0.001
# The earlier harness measured forward and loss as one.
PHASES = {"forward": ("forward", "loss"), "zero": ("zero_grad",)}


@cache
def runs() -> dict[str, Run]:
    return {run.record.case.id: run for run in validate(FILES).runs}


CASES = list(runs())
WITH_PHASES = [name for name, run in runs().items() if run.record.phases]


def test_no_row_is_left_out() -> None:
    assert len(CASES) == 14 and len(WITH_PHASES) == 12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tier", TOLERANCES)
def test_peak_is_the_measured_one(name: str, tier: str) -> None:
    row = runs()[name].row(tier)
    assert row is not None
    assert abs(row.error) <= TOLERANCES[tier], f"{row.predicted_bytes:,} for {row.measured_bytes:,}"


@pytest.mark.parametrize("name", WITH_PHASES)
def test_peak_falls_in_the_measured_phase(name: str) -> None:
    assert runs()[name].phase_is_right


@pytest.mark.parametrize("name", WITH_PHASES)
def test_each_phase_of_the_steady_step_is_the_measured_one(name: str) -> None:
    run = runs()[name]
    last = run.record.phases[-1].step
    off = []
    for measured in (phase for phase in run.record.phases if phase.step == last):
        peak_bytes, end_bytes = _predicted(run, measured)
        for what, predicted, was in (
            ("peak", peak_bytes, measured.peak_allocated_bytes),
            ("end", end_bytes, measured.allocated_bytes),
        ):
            if abs(predicted - was) > PHASE_TOLERANCE * was:
                off.append(f"{measured.phase} {what}: {predicted:,} for {was:,}")
    assert not off, "\n".join(["", *off])


def _predicted(run: Run, measured: PhaseFigures) -> tuple[int, int]:
    """Allocated at the peak and at the end of that phase in the steady state."""
    step = run.estimate.simulation.phases[-1]
    parts: list[PhaseMemory] = [step[name] for name in PHASES.get(measured.phase, (measured.phase,))]
    return max(part.peak_allocated_bytes for part in parts), parts[-1].allocated_bytes
