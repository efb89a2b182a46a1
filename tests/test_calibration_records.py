"""Measurement files: what is written is read back, the earlier format too, and neither needs torch."""

import json
import subprocess
import sys

import pytest

from memplan.calibration.record import (
    Case,
    Environment,
    OutOfMemory,
    PhaseFigures,
    Record,
    dump_line,
    read_cases,
    read_records,
    write_cases,
)
from memplan.errors import MemplanError

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
# The first record of the earlier harness on an H200, its last step alone.
LEGACY = {
    "case": {"id": "l7-qlora-ckpt", "model": LLAMA, "method": "qlora", "batch": 1, "seq": 512, "ckpt": True},
    "nvml_start": 644939776, "nvml_ctx": 1295908864, "n_params": 6738415616, "alloc_base": 3888621568,
    "alloc_model": 4573349888, "load_s": 1.76, "n_trainable": 39976960, "trainable_dtypes": ["torch.float32"],
    "steps": [{
        "fwd": {"alloc": 5303703040, "peak": 5381027840, "res": 6073352192, "peak_res": 6073352192},
        "bwd": {"alloc": 5136968192, "peak": 5507648512, "res": 6073352192, "peak_res": 6073352192},
        "clip": {"alloc": 5120190464, "peak": 5136968192, "res": 6073352192, "peak_res": 6073352192},
        "opt": {"alloc": 5120190464, "peak": 5280098304, "res": 6073352192, "peak_res": 6073352192},
        "zero": {"alloc": 4960282624, "peak": 5120190464, "res": 6073352192, "peak_res": 6073352192},
        "s": 0.5,
    }],
    "peak_alloc": 5507648512, "peak_phase": "bwd", "peak_reserved": 6073352192, "nvml_end": 7505575936,
    "opt_state": 319817472,
}  # fmt: skip


def record(**fields):
    case = Case(id="one", hf_config=LLAMA, config={"method": "lora", "stack": "torch", "rank": 8})
    return Record(**{"case": case, "status": "ok", **fields})


def test_a_file_is_read_as_it_was_written(tmp_path):
    environment = Environment(gpu="NVIDIA H100 80GB HBM3", gpu_total_bytes=85520809984, torch="2.11.0")
    phase = PhaseFigures(
        step=1,
        phase="forward",
        allocated_bytes=1,
        peak_allocated_bytes=2,
        reserved_bytes=3,
        peak_reserved_bytes=4,
    )
    oom = OutOfMemory(phase="backward", step=1, tried_bytes=None, allocated_bytes=5, reserved_bytes=6)
    records = (record(phases=(phase,), peak_allocated_bytes=2), record(status="oom", oom=oom))
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(dump_line, (environment, *records))) + "\n")

    read = read_records(path)
    assert read.environment == environment
    assert read.records == records
    assert read.records[0].case.train_config().rank == 8


def test_the_earlier_format_becomes_the_same_record(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps(LEGACY) + "\n")
    (old,) = read_records(path).records
    config = old.case.train_config()
    assert (config.method, config.stack, config.rank, config.seq_len) == ("qlora", "torch", 16, 512)
    assert (config.gradient_checkpointing, config.autocast, config.kbit_prep) == (True, False, True)
    assert config.optimizer == "adamw_torch"
    assert [row.phase for row in old.phases] == ["forward", "backward", "clip", "optimizer", "zero"]
    assert old.peak_allocated_bytes == max(row.peak_allocated_bytes for row in old.phases)
    assert old.device_overhead_bytes == 7505575936 - 6073352192


def test_an_earlier_case_with_an_unknown_setting_is_refused(tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text(json.dumps({**LEGACY, "case": {**LEGACY["case"], "flash": True}}))
    with pytest.raises(MemplanError, match="line 1 is not a record: unknown case key `flash`"):
        read_records(path)


@pytest.mark.parametrize("line", ["[]", "3", "{", '{"case": {}}', '{"environment": {"gpu": 1}}', '{"status": "ok"}'])
def test_a_broken_line_is_a_users_error(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(dump_line(record()) + "\n" + line)
    with pytest.raises(MemplanError, match="line 2 is not a record"):
        read_records(path)


def test_a_missing_file_is_a_users_error(tmp_path):
    with pytest.raises(MemplanError, match="cannot read measurements"):
        read_records(tmp_path / "none.jsonl")


def test_cases_are_read_as_written_and_ids_are_unique(tmp_path):
    path = tmp_path / "cases.json"
    cases = tuple(Case(id=name, hf_config=LLAMA, config={"method": "full"}) for name in ("a", "b"))
    write_cases(cases, path)
    assert read_cases(path) == cases
    write_cases((*cases, cases[0]), path)
    with pytest.raises(MemplanError, match="two cases with the id `a`"):
        read_cases(path)


@pytest.mark.parametrize(
    "case",
    [
        {"id": "../escape", "hf_config": LLAMA, "config": {}},
        {"id": "a", "hf_config": LLAMA, "config": {"method": "full", "rank": 3}},
        {"id": "a", "hf_config": LLAMA, "config": {}, "spanshot": True},
    ],
)
def test_a_wrong_case_is_a_users_error(tmp_path, case):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case]))
    with pytest.raises(MemplanError, match="is not a list of cases"):
        read_cases(path)


def test_reading_and_comparing_import_no_torch():
    modules = "memplan.calibration.record, memplan.calibration.compare, memplan.calibration.design"
    code = f"import sys, {modules}, memplan.calibration.trace; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
