"""Every shipped record replayed: how far memplan is from what an H200 and an H100 measured, and that it stays so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memplan.calibration.compare import Row
from memplan.validation import Run, Validation, shipped_files
from tests.shipped_records import shipped

pytestmark = pytest.mark.xdist_group("shipped records")  # one process replays them

FILES = {
    "h100-drawn", "h100-expandable-segments", "h100-published", "h100-quick", "h200-before-freeze", "h200-drawn",
    "h200-drawn-2", "h200-limits", "h200-max-split-size", "h200-published", "h200-real",
}  # fmt: skip
MOE = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"}


@pytest.fixture(scope="module")
def validation() -> Validation:
    return shipped()


def is_int8(run: Run) -> bool:
    """LLM.int8 keeps columns with an activation over 6: data, of which only the expected number is known."""
    return run.base == "int8"


def rows(validation: Validation, tier: str, where: Callable[[Run], bool] = lambda run: True) -> list[Row]:
    return validation.rows(tier, [run for run in validation.runs if where(run) and not is_int8(run)])


def mean(found: list[Row]) -> float:
    return sum(abs(row.error) for row in found) / len(found)


def worst(found: list[Row]) -> Row:
    return max(found, key=lambda row: abs(row.error))


def test_every_record_is_replayed(validation: Validation) -> None:
    assert {path.stem for path in shipped_files()} >= FILES
    assert not validation.comparison.unpredicted
    assert len(validation.runs) >= 800
    assert len({run.family for run in validation.runs}) >= 36
    assert {run.method for run in validation.runs} == {"full", "lora", "qlora"}
    assert {run.stack for run in validation.runs} == {"torch", "trainer", "trl"}


@pytest.mark.parametrize("file", sorted(FILES))
def test_allocated(validation: Validation, file: str) -> None:
    found = rows(validation, "allocated", lambda run: run.file == file)
    assert mean(found) <= 0.0005
    assert abs(worst(found).error) <= 0.01, worst(found)


@pytest.mark.parametrize("file", sorted(FILES - {"h200-limits"}))
def test_process(validation: Validation, file: str) -> None:
    found = rows(validation, "process", lambda run: run.file == file)
    assert mean(found) <= 0.0025
    assert abs(worst(found).error) <= 0.03, worst(found)


@pytest.mark.parametrize("file", sorted(FILES - {"h200-limits"}))
def test_reserved(validation: Validation, file: str) -> None:
    found = rows(validation, "reserved", lambda run: run.file == file)
    assert mean(found) <= 0.003
    assert abs(worst(found).error) <= 0.035, worst(found)


def test_half_of_all_runs_are_exact(validation: Validation) -> None:
    for tier in ("allocated", "reserved"):
        found = rows(validation, tier)
        assert sum(row.error == 0 for row in found) >= len(found) / 2, tier


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_each_method(validation: Validation, method: str) -> None:
    assert mean(rows(validation, "allocated", lambda run: run.method == method)) <= 0.0005


def test_int8_bases(validation: Validation) -> None:
    """Outliers as expected of fresh weights: rather too many, never too few. But as many in each layer, so that the
    allocator finds the places of one for the next, where really no two are alike."""
    runs = [run for run in validation.runs if is_int8(run)]
    assert len(runs) >= 35
    allocated = validation.rows("allocated", runs)
    assert mean(allocated) <= 0.003
    assert all(-0.0005 <= row.error <= 0.045 for row in allocated), worst(allocated)
    for tier in ("reserved", "process"):
        assert mean(validation.rows(tier, runs)) <= 0.008, tier
        assert abs(worst(validation.rows(tier, runs)).error) <= 0.105, tier


def test_other_settings_of_the_allocator(validation: Validation) -> None:
    """Runs under PYTORCH_ALLOC_CONF, which the file's environment tells: all tiers to the byte."""
    for file in ("h100-expandable-segments", "h200-max-split-size"):
        assert (environment := validation.environments[file]) is not None and environment.allocator_conf
        runs = [run for run in validation.runs if run.file == file]
        assert runs
        assert all(row.error == 0 for run in runs for row in run.rows), file


def test_mixtures_of_experts(validation: Validation) -> None:
    assert mean(rows(validation, "allocated", lambda run: run.family in MOE)) <= 0.001


def test_the_peak_falls_where_it_was_measured(validation: Validation) -> None:
    share = validation.share_of_right_phases
    assert share is not None
    assert share >= 0.99


def test_no_verdict_promises_what_ran_out(validation: Validation) -> None:
    verdicts = validation.comparison.verdicts
    assert len(verdicts) >= 32
    assert not [verdict for verdict in verdicts if verdict.is_false_fit]
