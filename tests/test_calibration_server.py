"""The fork server: whatever a run does to its process, the parent goes on and says what happened."""

import os
import signal
import time

import pytest

from memplan.calibration.record import Case, Record
from memplan.calibration.server import run_all, run_forked

CASE = Case(id="one", hf_config={"model_type": "llama"}, config={"method": "full"})


def ok(case):
    print("hello from the run")
    return Record(case=case, status="ok", num_params=os.getpid())


def test_a_record_comes_back_from_another_process_and_its_output_goes_to_the_log(tmp_path):
    log = tmp_path / "log"
    record = run_forked(CASE, ok, timeout=30, log=log)
    assert record.status == "ok"
    assert record.num_params != os.getpid()
    assert "hello from the run" in log.read_text()


def test_an_exception_a_signal_and_a_timeout_are_records(tmp_path):
    def raises(case):
        raise RuntimeError("no such kernel")

    def dies(case):
        os.kill(os.getpid(), signal.SIGKILL)

    log = tmp_path / "log"
    raised = run_forked(CASE, raises, timeout=30, log=log)
    assert (raised.status, raised.error) == ("error", "the run's process ended with exit status 1")
    assert "no such kernel" in log.read_text()
    died = run_forked(CASE, dies, timeout=30, log=log)
    assert (died.status, died.error) == ("error", "the run's process ended with signal SIGKILL")
    slow = run_forked(CASE, lambda case: time.sleep(60), timeout=0.2, log=log)
    assert slow.status == "timeout"


def test_ctrl_c_ends_the_child_and_reaches_the_caller(tmp_path):
    def interrupts(case):
        (tmp_path / "pid").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        run_forked(CASE, interrupts, timeout=30, log=tmp_path / "log")
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_no_case_is_begun_that_would_overrun_the_limit():
    cases = [CASE.model_copy(update={"id": str(number)}) for number in range(10)]
    done = []

    def one(case):
        time.sleep(0.1)
        return Record(case=case, status="ok")

    num_run = run_all(cases, one, limit_seconds=0.35, on_record=done.append)
    assert 1 <= num_run == len(done) <= 3
    assert run_all(cases[:2], one, on_record=done.append) == 2
