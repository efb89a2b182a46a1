"""A calibration's profile replaces the runtime constants of its GPU, and only those."""

from pathlib import Path

import pytest

import memplan
from memplan import profiles
from memplan.calibration.profile_of import profile_of
from memplan.calibration.record import Case, DeviceReading, Environment, Record
from memplan.errors import InvalidSpecError, MemplanError

CASE = {"model_type": "llama", "hidden_size": 64}


def reading(used: int) -> DeviceReading:
    return DeviceReading(used_bytes=used, reserved_bytes=100, total_bytes=10_000)


def record(case_id: str, reserved: int, process: int, status: str = "ok") -> Record:
    return Record(
        case=Case(id=case_id, hf_config=CASE, config={}),
        status=status,
        peak_reserved_bytes=reserved,
        process_bytes=process,
        device={"start": reading(0), "context": reading(300)},
    )


ENVIRONMENT = Environment(gpu="NVIDIA H200", gpu_total_bytes=10_000, gpu_reserved_bytes=100, date="2026-01-02")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMPLAN_PROFILES", str(tmp_path))
    return tmp_path


def test_constants_come_from_finished_runs_only() -> None:
    made = profile_of(ENVIRONMENT, [record("a", 1000, 1450), record("b", 2000, 2466), record("c", 1, 9999, "oom")])
    assert (made.driver_bytes, made.context_bytes, made.kernels_bytes) == (100, 300, 50)
    assert made.fused_attention_bytes == 16
    assert made.num_runs == 2


def test_no_finished_run_gives_no_profile() -> None:
    with pytest.raises(MemplanError, match="no run gave"):
        profile_of(ENVIRONMENT, [record("c", 1, 2, "oom")])


def test_an_estimate_for_that_gpu_uses_the_profile_and_says_so(folder: Path) -> None:
    before = memplan.estimate("llama-7b", gpu="h200")
    assert before.runtime.basis == "measured"
    profiles.save(profile_of(ENVIRONMENT, [record("a", 1000, 1450)]))
    after = memplan.estimate("llama-7b", gpu="h200")
    assert after.runtime.basis == "profile"
    assert "2026-01-02" in after.runtime.source
    assert after.reserved_bytes == before.reserved_bytes
    assert after.process_bytes == after.reserved_bytes + 450
    assert memplan.estimate("llama-7b", gpu="rtx-4090").runtime.basis != "profile"


def test_a_broken_profile_is_one_clear_error(folder: Path) -> None:
    (folder / "h200.json").write_text("{not json")
    with pytest.raises(InvalidSpecError, match="cannot be read"):
        memplan.estimate("llama-7b", gpu="h200")
