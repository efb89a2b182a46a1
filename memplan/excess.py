"""`python -m memplan.excess --out memplan/data/residuals.json`: by how much measured runs exceeded memplan.

Replays the shipped records (or the files named) and widens the bands of `memplan.residuals` to hold all of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from memplan.calibration.record import Record, read_records
from memplan.estimate import Estimate
from memplan.memory.allocator import OutOfMemory
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.simulate import simulate
from memplan.model_spec import ModelSpec
from memplan.residuals import KINDS, Band, bands, kind, measured_band
from memplan.validation import Validation, gpu_of, shipped_files, validate


def excess_bytes(made: Estimate, allocated_bytes: int, reserved_bytes: int | None) -> int:
    """What a run took beyond its prediction, in either tier; `reserved_bytes` None where a limit held it down."""
    reserved = 0 if reserved_bytes is None else reserved_bytes - made.reserved_bytes
    return max(0, allocated_bytes - made.allocated_bytes, reserved)


def excess_at_limit(made: Estimate, limit_bytes: int) -> int:
    """For a run that ran out of memory under `limit_bytes`: how much less it would have to be for memplan to say so.

    0 where it says so already; found to a thousandth of the limit.
    """
    for part in range(1000):
        margin = limit_bytes * part // 1000
        try:
            simulate(made.program, replace(AllocatorConfig(), limit_bytes=limit_bytes - margin))
        except OutOfMemory:
            return margin
    return limit_bytes


def runs_at_limits(paths: Iterable[Path]) -> list[tuple[Record, Estimate]]:
    """Runs under a memory limit, and what is predicted for each."""
    found = []
    for path in paths:
        file = read_records(path)
        for record in file.records:
            if record.case.memory_limit_bytes is not None:
                config = record.case.train_config()
                found.append((record, Estimate(ModelSpec.from_hf_config(record.case.hf_config), config, gpu_of(file))))
    return found


def measured_bands(validation: Validation, at_limits: Iterable[tuple[Record, Estimate]]) -> dict[str, Band]:
    """By kind of run, the band that these runs need."""
    excesses: dict[str, list[tuple[int, int]]] = {name: [] for name in KINDS}
    for run in validation.runs:
        allocated, reserved = run.row("allocated"), run.row("reserved")
        if allocated is not None:
            made = run.estimate
            excess = excess_bytes(made, allocated.measured_bytes, reserved.measured_bytes if reserved else None)
            excesses[kind(made.config)].append((made.tensor_bytes, excess))
    for record, made in at_limits:
        if record.status == "oom" and record.case.memory_limit_bytes is not None:
            excess = excess_at_limit(made, record.case.memory_limit_bytes)
            excesses[kind(made.config)].append((made.tensor_bytes, excess))
    return {name: measured_band(found) for name, found in excesses.items()}


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    records: Annotated[list[Path] | None, typer.Argument(help="Record files; the shipped ones unless given.")] = None,
) -> None:
    """Widen the bands to what the records show."""
    paths = records or shipped_files()
    found = measured_bands(validate(paths), runs_at_limits(paths))
    wider = {
        name: Band(
            max(new.share_of_large_runs, old.share_of_large_runs),
            max(new.bytes_of_small_runs, old.bytes_of_small_runs),
        )
        for (name, new), old in zip(found.items(), map(bands().__getitem__, found), strict=True)
    }
    body = {name: dataclasses.asdict(band) for name, band in wider.items()}
    out.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({name: dataclasses.asdict(band) for name, band in found.items()}, indent=2))


if __name__ == "__main__":
    typer.run(main)
