"""`python -m memplan.calibration.measure --cases cases.json --out records.jsonl`: measure a list of cases.

One record a line is appended as soon as its run ends. Cases whose id the file already holds are left out, so
that a measurement cut short goes on where it stopped.
"""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from memplan.calibration.record import Case, Record, dump_line, read_cases, read_records
from memplan.calibration.server import Runner, run_all, run_forked
from memplan.errors import MemplanError
from memplan.units import GIB

_console = Console(stderr=True)
# How CUDA words it when a parent had touched it before the fork.
_FORK_SPOILED = ("re-initialize CUDA in forked subprocess", "CUDA error: initialization error")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    cases: Annotated[Path, typer.Option(help="JSON array of cases.")],
    out: Annotated[Path, typer.Option(help="Measurement file (JSON lines), appended to.")],
    timeout: Annotated[float, typer.Option(help="Seconds a case may take.")] = 120.0,
    limit_seconds: Annotated[float | None, typer.Option(help="Begin no case after this many seconds.")] = None,
    snapshot: Annotated[bool, typer.Option(help="Trace every case, whatever it says.")] = False,
    trace_dir: Annotated[Path | None, typer.Option(help="Where traces go; OUT.traces unless told.")] = None,
    stacks: Annotated[str, typer.Option(help="Stacks of a trace: all (with C++) or python.")] = "all",
    only: Annotated[str, typer.Option(help="Run only cases whose id contains this.")] = "",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the harness (no figures).")] = "cuda",
    spawn: Annotated[bool, typer.Option(help="Start an interpreter a case instead of forking.")] = False,
) -> None:
    """Measure every case and print a table."""
    try:
        wanted = [case for case in read_cases(cases) if only in case.id]
        done = {record.case.id for record in read_records(out).records} if out.exists() else set()
        todo = [case for case in wanted if case.id not in done]
        if snapshot:
            todo = [case.model_copy(update={"snapshot": True}) for case in todo]
        traces = trace_dir or out.with_name(out.name + ".traces")
        num_left = measure(todo, out, traces, timeout, limit_seconds, device=device, stacks=stacks, spawn=spawn)
        print_table(read_records(out).records)
    except MemplanError as error:
        for line in (f"error: {error.message}", *(f"hint: {hint}" for hint in error.hints)):
            print(line, file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print(f"interrupted; finished runs are in {out}", file=sys.stderr)
        raise typer.Exit(130) from None
    if num_left:
        print(f"time limit: {num_left} cases not run", file=sys.stderr)


def measure(
    cases: list[Case], out: Path, trace_dir: Path, timeout: float, limit_seconds: float | None, *,
    device: str = "cuda", stacks: str = "all", spawn: bool = False,
) -> int:  # fmt: skip
    """Run the cases, appending to `out`; returns how many the time limit left out.

    Raises:
        MemplanError: no NVIDIA driver, or a library that measuring needs is not installed.
    """
    began = time.monotonic()
    spawned: Runner = partial(run_spawned, trace_dir=trace_dir, timeout=timeout, device=device, stacks=stacks)
    one = spawned
    if not spawn:
        from memplan.calibration.preload import preload

        opened = preload(cases)
        if opened is not None:
            _console.print(f"importing {opened} opened CUDA: starting an interpreter a case, not forking")
        else:
            runner = partial(_run_here, trace_dir=trace_dir, device=device, stacks=stacks)
            forked = partial(run_forked, runner=runner, timeout=timeout, log=out.with_name(out.name + ".log"))
            one = _Falling(forked, spawned)
    if not out.exists() or not out.stat().st_size:
        from memplan.calibration.environment import read_environment

        _append(out, dump_line(read_environment(device)))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    # No refresh thread: a process that forks had better have none.
    with Progress(*columns, console=_console, auto_refresh=False, disable=not _console.is_terminal) as progress:
        task = progress.add_task("measuring", total=len(cases))

        def keep(record: Record) -> None:
            _append(out, dump_line(record))
            progress.update(task, advance=1, description=record.case.id, refresh=True)
            if not _console.is_terminal:
                _console.print(_line(record), highlight=False, soft_wrap=True)

        left = None if limit_seconds is None else limit_seconds - (time.monotonic() - began)
        return len(cases) - run_all(cases, one, limit_seconds=left, on_record=keep)


class _Falling:
    """Forks, until a child finds that CUDA cannot be opened in it; from then on starts interpreters."""

    def __init__(self, forked: Runner, spawned: Runner) -> None:
        self._one, self._spawned = forked, spawned

    def __call__(self, case: Case) -> Record:
        record = self._one(case)
        if self._one is not self._spawned and any(sign in (record.error or "") for sign in _FORK_SPOILED):
            _console.print("CUDA cannot be opened after a fork here: starting an interpreter a case")
            self._one = self._spawned
            record = self._one(case)
        return record


def run_spawned(case: Case, *, trace_dir: Path, timeout: float, device: str, stacks: str) -> Record:
    """The case in a fresh interpreter: slower, for where importing opens CUDA."""
    command = [sys.executable, "-m", "memplan.calibration.once", "--device", device, "--stacks", stacks,
               "--trace-dir", str(trace_dir)]  # fmt: skip
    try:
        ended = subprocess.run(
            command, input=dump_case(case), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return Record(case=case, status="timeout", error=f"killed after {timeout:.0f} s")
    lines = ended.stdout.strip().splitlines()
    if ended.returncode != 0 or not lines:
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        return Record(case=case, status="error", error=f"exit status {ended.returncode}: {last}")
    return Record.model_validate_json(lines[-1])


def dump_case(case: Case) -> str:
    return case.model_dump_json(exclude_defaults=True)


def print_table(records: tuple[Record, ...]) -> None:
    """A row a run, on stdout, in GiB."""
    table = Table(box=None, pad_edge=False)
    text = ("id", "status", "peak phase")
    for name in ("id", "status", "allocated", "reserved", "process", "peak phase", "s/step", "s"):
        table.add_column(name, justify="left" if name in text else "right", no_wrap=True)
    for record in records:
        phase = record.peak_phase or (record.oom.phase if record.oom else "")
        sizes = (record.peak_allocated_bytes, record.peak_reserved_bytes, record.process_bytes)
        fastest = f"{min(record.step_seconds):.3f}" if record.step_seconds else ""
        wall = f"{record.wall_seconds or 0:.1f}"
        table.add_row(record.case.id, record.status, *map(_gib, sizes), phase, fastest, wall)
    Console(width=140).print(table)
    for record in records:
        if record.status not in ("ok", "oom"):
            print(f"{record.case.id}: {record.status}: {record.error}")


def _run_here(case: Case, *, trace_dir: Path, device: str, stacks: str) -> Record:
    from memplan.calibration.run import run_case

    return run_case(case, device=device, trace_path=trace_dir / f"{case.id}.jsonl.gz", stacks=stacks)


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.3f}"


def _line(record: Record) -> str:
    peak = _gib(record.peak_allocated_bytes)
    text = f"{record.case.id}: {record.status} {peak} GiB {record.wall_seconds or 0:.1f} s"
    return f"{text} {record.error}" if record.error else text


if __name__ == "__main__":
    app()
