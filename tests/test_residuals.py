"""The band of `fit` is what the shipped records say, and with it no measured run is promised a card that it overran."""

from __future__ import annotations

import pytest

from memplan.calibration.record import Record
from memplan.estimate import Estimate
from memplan.excess import measured_bands, runs_at_limits
from memplan.memory.allocator import OutOfMemory
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.simulate import simulate
from memplan.residuals import band, bands
from memplan.validation import shipped_files
from tests.shipped_records import shipped

pytestmark = pytest.mark.xdist_group("shipped records")  # one process replays them

AtLimits = list[tuple[Record, Estimate]]


@pytest.fixture(scope="module")
def at_limits() -> AtLimits:
    """Runs at the largest micro-batch that memplan lets through without a band, and one beyond: 8 to 80 GB."""
    return runs_at_limits(path for path in shipped_files() if path.stem == "h200-limits")


def test_no_record_exceeds_the_bands(at_limits: AtLimits) -> None:
    """The bands may be wider: they are not narrowed when a correction is found from the very runs that set them."""
    for kind, measured in measured_bands(shipped(), at_limits).items():
        assert bands()[kind].bytes_of_small_runs >= measured.bytes_of_small_runs
        assert bands()[kind].share_of_large_runs >= measured.share_of_large_runs


def test_no_run_that_ran_out_is_said_to_fit(at_limits: AtLimits) -> None:
    assert {record.status for record, _ in at_limits} == {"ok", "oom"}
    for record, made in at_limits:
        if record.status == "oom":
            assert not gets_through(made, limit_of(record) - band(made.config, made.tensor_bytes)), record.case.id


def test_most_edges_are_found_to_the_batch(at_limits: AtLimits) -> None:
    right = [gets_through(made, limit_of(record)) == (record.status == "ok") for record, made in at_limits]
    assert sum(right) >= len(right) - 2, f"{sum(right)} of {len(right)}"


def limit_of(record: Record) -> int:
    assert record.case.memory_limit_bytes is not None
    return record.case.memory_limit_bytes


def gets_through(made: Estimate, limit_bytes: int) -> bool:
    try:
        simulate(made.program, AllocatorConfig(limit_bytes=limit_bytes))
    except OutOfMemory:
        return False
    return True
