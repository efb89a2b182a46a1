"""Predicted against measured: signs, shares and verdicts, on figures one can check in the head."""

from types import SimpleNamespace

import pytest

from memplan.calibration.compare import compare
from memplan.calibration.record import Case, Record
from memplan.errors import MemplanError

CONFIG = {"method": "lora", "stack": "torch"}


def run(name, allocated, reserved=2000, process=4000, status="ok", **case):
    return Record(
        case=Case(id=name, hf_config={"model_type": "llama", "name": name}, config=CONFIG, **case),
        status=status, peak_allocated_bytes=allocated, peak_reserved_bytes=reserved, process_bytes=process,
    )  # fmt: skip


def predict(hf_config, config):
    assert config.method == "lora"
    return SimpleNamespace(allocated_bytes=1000, reserved_bytes=2000, process_bytes=4000)


def test_errors_are_shares_of_the_measured_bytes():
    found = compare([run("over", 800), run("exact", 1000), run("under", 1250)], predict)
    summary = found.summaries["allocated"]
    assert [row.error for row in found.rows if row.tier == "allocated"] == [0.25, 0.0, -0.2]
    assert summary.num_runs == 3
    assert summary.mean == pytest.approx(0.15)
    assert summary.median == pytest.approx(0.2)
    assert (summary.worst, summary.worst_case_id) == (0.25, "over")
    assert summary.bias == pytest.approx(0.05 / 3)
    assert summary.num_dangerous == 1
    assert found.summaries["reserved"].worst == found.summaries["process"].worst == 0


def test_half_a_percent_below_is_not_yet_dangerous():
    found = compare([run("near", 1005), run("far", 1006)], predict)
    assert [row.case_id for row in found.rows if row.is_dangerous] == ["far"]


def test_a_run_under_a_limit_gives_a_verdict_and_its_allocated_bytes_alone():
    rows = [
        run("fits", 900, memory_limit_bytes=2500),
        run("false-fit", None, None, None, status="oom", memory_limit_bytes=2200),
        run("refused", None, None, None, status="oom", memory_limit_bytes=1500),
    ]
    found = compare(rows, predict)
    assert [(v.case_id, v.predicted_fits, v.ran, v.is_false_fit) for v in found.verdicts] == [
        ("fits", True, True, False), ("false-fit", True, False, True), ("refused", False, False, False),
    ]  # fmt: skip
    assert {row.tier for row in found.rows} == {"allocated"}


def test_out_of_memory_on_the_whole_card_is_judged_by_process_bytes():
    oom = run("full-card", None, None, None, status="oom")
    assert compare([oom], predict).verdicts == ()
    (verdict,) = compare([oom], predict, capacity_bytes=4000).verdicts
    assert verdict.is_false_fit


def test_what_memplan_refuses_is_listed_with_its_reason():
    def refuse(hf_config, config):
        raise MemplanError("unknown family")

    found = compare([run("new", 1), run("broken", 1, status="error")], refuse)
    assert [(u.case_id, u.reason) for u in found.unpredicted] == [("new", "unknown family")]
    assert found.rows == ()
    assert found.summaries == {}
