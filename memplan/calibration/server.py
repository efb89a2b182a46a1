"""One process a case, quickly: a parent that has imported everything, but never touched CUDA, forks a child.

The context, the allocator and the libraries' handles start fresh in each run, and no import is paid twice.
A crash or a timeout ends one case; Ctrl-C keeps what is done.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from memplan.calibration.record import Case, Record, dump_line

Runner = Callable[[Case], Record]


def run_forked(case: Case, runner: Runner, *, timeout: float, log: Path | None = None) -> Record:
    """`runner(case)` in a forked child; how the child ended is in the record if it left none.

    Args:
        timeout: seconds after which the child is killed.
        log: file that takes the child's stdout and stderr (appended); None leaves them alone.

    Raises:
        KeyboardInterrupt: passed on, after the child is gone.
    """
    with tempfile.TemporaryDirectory(prefix="memplan-") as folder:
        answer = Path(folder, "record.json")
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads; those of the imported libraries are idle and hold no lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            _child(case, runner, answer, log)
        began = time.monotonic()
        try:
            status = _wait(pid, began + timeout)
        except BaseException:
            _kill(pid)
            raise
        if answer.exists():
            return Record.model_validate_json(answer.read_text(encoding="utf-8"))
        wall = round(time.monotonic() - began, 3)
        if status is None:
            _kill(pid)
            return Record(case=case, status="timeout", error=f"killed after {timeout:.0f} s", wall_seconds=wall)
        if os.WIFSIGNALED(status):
            how = f"signal {signal.Signals(os.WTERMSIG(status)).name}"
        else:
            how = f"exit status {os.waitstatus_to_exitcode(status)}"
        return Record(case=case, status="error", error=f"the run's process ended with {how}", wall_seconds=wall)


def run_all(
    cases: Iterable[Case], run_one: Callable[[Case], Record], *, limit_seconds: float | None = None,
    on_record: Callable[[Record], None],
) -> int:  # fmt: skip
    """Run the cases one after the other; returns how many were run.

    A case is not begun once `limit_seconds` have passed, nor when the longest case so far would overrun them.
    """
    began, longest = time.monotonic(), 0.0
    num_run = 0
    for case in cases:
        now = time.monotonic()
        if limit_seconds is not None and now - began + longest > limit_seconds:
            break
        on_record(run_one(case))
        longest = max(longest, time.monotonic() - now)
        num_run += 1
    return num_run


def _child(case: Case, runner: Runner, answer: Path, log: Path | None) -> None:
    # Ctrl-C reaches the whole group: the parent alone decides, so that its answer is orderly.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = 1
    try:
        if log is not None:
            target = log.open("a", buffering=1, encoding="utf-8")
            os.dup2(target.fileno(), 1)  # what C libraries print
            os.dup2(target.fileno(), 2)
            sys.stdout = sys.stderr = target
            print(f"--- {case.id}", flush=True)
        record = runner(case)
        partial = answer.with_suffix(".partial")
        partial.write_text(dump_line(record), encoding="utf-8")
        partial.rename(answer)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the parent's clean-up must not run twice.
        os._exit(code)


def _wait(pid: int, deadline: float) -> int | None:
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(0.02)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
