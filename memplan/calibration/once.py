"""One case on stdin, its record on stdout: `measure` starts this where it cannot fork."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from memplan.calibration.record import Case, dump_line


def main(
    trace_dir: Annotated[Path, typer.Option()],
    device: Annotated[str, typer.Option()] = "cuda",
    stacks: Annotated[str, typer.Option()] = "all",
) -> None:
    case = Case.model_validate_json(sys.stdin.read())
    with contextlib.redirect_stdout(sys.stderr):
        from memplan.calibration.run import run_case

        record = run_case(case, device=device, trace_path=trace_dir / f"{case.id}.jsonl.gz", stacks=stacks)
    print(dump_line(record))


if __name__ == "__main__":
    typer.run(main)
