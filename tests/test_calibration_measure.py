"""The measuring command appends as it goes, goes on where it stopped, and words its errors for people."""

import subprocess
import sys

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from memplan.calibration.record import Case, read_records, write_cases

pytestmark = pytest.mark.filterwarnings("default")  # the libraries warn freely
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture
def cases(tmp_path):
    said = {"stack": "torch", "seq_len": 8}
    write_cases(
        [Case(id=f"tiny-{m}", hf_config=LLAMA, config={"method": m, **said}) for m in ("full", "lora")],
        tmp_path / "cases.json",
    )
    return tmp_path / "cases.json"


def run(*arguments):
    """In an interpreter of its own: a fork of one whose torch has made threads can wait for them for ever."""
    command = [sys.executable, "-m", "memplan.calibration.measure", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_runs_are_appended_and_not_made_twice(cases, tmp_path):
    out = tmp_path / "records.jsonl"
    first = run("--cases", cases, "--out", out, "--device", "cpu", "--only", "full")
    assert first.returncode == 0, first.stderr
    assert [r.case.id for r in read_records(out).records] == ["tiny-full"]
    again = run("--cases", cases, "--out", out, "--device", "cpu")
    assert again.returncode == 0, again.stderr
    file = read_records(out)
    assert [(r.case.id, r.status) for r in file.records] == [("tiny-full", "ok"), ("tiny-lora", "ok")]
    assert file.environment is not None
    assert file.environment.transformers is not None
    assert "tiny-lora" in again.stdout


def test_a_spent_time_limit_leaves_cases_and_says_so(cases, tmp_path):
    done = run("--cases", cases, "--out", tmp_path / "r.jsonl", "--device", "cpu", "--limit-seconds", 0)
    assert done.returncode == 0
    assert "2 cases not run" in done.stderr


def test_missing_cases_are_a_users_error(tmp_path):
    done = run("--cases", tmp_path / "none.json", "--out", tmp_path / "r.jsonl")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read cases")
