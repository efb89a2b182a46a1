"""The band of `fit` is what the shipped records say, and with it no measured run is promised a card that it overran."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from memplan.calibration.record import read_records
from memplan.estimate import Estimate
from memplan.memory.allocator import OutOfMemory
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.simulate import simulate
from memplan.model_spec import ModelSpec
from memplan.residuals import band, excess_at_limit, excess_bytes, measured_excess
from memplan.validation import Validation, gpu_of, records_dir
from tests.shipped_records import shipped


def limit_runs() -> list[tuple[str, str, int, Estimate]]:
    """id, status, limit and estimate of the runs at the edge of smaller cards."""
    file = read_records(records_dir() / "h200-limits.jsonl")
    found: list[tuple[str, str, int, Estimate]] = []
    for record in file.records:
        config = record.case.train_config()
        made = Estimate(ModelSpec.from_hf_config(record.case.hf_config), config, gpu_of(file))
        assert record.case.memory_limit_bytes is not None
        found.append((record.case.id, record.status, record.case.memory_limit_bytes, made))
    return found


@pytest.fixture(scope="module")
def at_limits() -> list[tuple[str, str, int, Estimate]]:
    return limit_runs()


def excesses(validation: Validation, at_limits: list[tuple[str, str, int, Estimate]]) -> list[tuple[int, int]]:
    found = []
    for run in validation.runs:
        allocated, reserved = run.row("allocated"), run.row("reserved")
        assert allocated is not None
        made = run.estimate
        excess = excess_bytes(made, allocated.measured_bytes, reserved.measured_bytes if reserved else None)
        found.append((made.tensor_bytes, excess))
    for _, status, limit, made in at_limits:
        if status == "oom":
            found.append((made.tensor_bytes, excess_at_limit(made, limit)))
    return found


def test_no_record_exceeds_the_band(at_limits: list[tuple[str, str, int, Estimate]]) -> None:
    """The band may be wider: it is not narrowed when a correction is found from the very runs that set it."""
    text = resources.files("memplan").joinpath("data/residuals.json").read_text(encoding="utf-8")
    band_, measured = json.loads(text), measured_excess(excesses(shipped(), at_limits))
    assert band_["bytes_of_small_runs"] >= measured["bytes_of_small_runs"]
    assert band_["share_of_large_runs"] >= measured["share_of_large_runs"]


def test_no_run_that_ran_out_is_said_to_fit(at_limits: list[tuple[str, str, int, Estimate]]) -> None:
    """Runs at the largest micro-batch that memplan lets through without a band, and one beyond: 8 to 80 GB."""
    assert {status for _, status, *_ in at_limits} == {"ok", "oom"}
    for case_id, status, limit, made in at_limits:
        if status == "oom":
            assert not gets_through(made, limit - band(made.tensor_bytes)), case_id


def test_most_edges_are_found_to_the_batch(at_limits: list[tuple[str, str, int, Estimate]]) -> None:
    right = [gets_through(made, limit) == (status == "ok") for _, status, limit, made in at_limits]
    assert sum(right) >= len(right) - 2, f"{sum(right)} of {len(right)}"


def gets_through(made: Estimate, limit_bytes: int) -> bool:
    try:
        simulate(made.program, AllocatorConfig(limit_bytes=limit_bytes))
    except OutOfMemory:
        return False
    return True
