"""Measured steps as the fit takes them: the work of each run, counted, and how long it took."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from memplan.calibration.record import Record, read_records
from memplan.errors import MemplanError
from memplan.estimate import Estimate
from memplan.gpus import GpuSpec
from memplan.model_spec import ModelSpec
from memplan.timing.model import StepTime, time_of
from memplan.timing.roofline import Constants
from memplan.timing.work import StepWork, step_work
from memplan.train_config import TrainConfig


@dataclass(frozen=True)
class Row:
    """One measured run and its counted work."""

    id: str
    file: str
    config: TrainConfig
    work: StepWork
    seconds: float
    """The fastest of its clean steps."""
    place: float
    """0 to 1, drawn from a seed by what the run is: repeats of one run stay together in a split."""

    def predict(self, gpu: GpuSpec, constants: Constants) -> StepTime:
        return time_of(self.work, self.config, gpu, constants)


def load_rows(paths: Iterable[Path], *, seed: int) -> tuple[list[Row], dict[str, int]]:
    """Rows of all finished runs with a step to go by, and how many were left out, by reason."""
    rows: list[Row] = []
    left_out: dict[str, int] = {}
    for path in paths:
        for record in read_records(path).records:
            if record.status != "ok" or not clean_steps(record):
                reason = "no step that is neither the first nor traced" if record.status == "ok" else record.status
                left_out[reason] = left_out.get(reason, 0) + 1
                continue
            try:
                rows.append(row_of(record, path.stem, seed=seed))
            except MemplanError as error:
                left_out[error.message] = left_out.get(error.message, 0) + 1
    return rows, left_out


def clean_steps(record: Record) -> list[float]:
    """Seconds of the steps that tell how fast the run is: not the first, which pays for compilation, allocation and the
    making of optimizer states, and not one during which allocations were traced."""
    traced = record.case.snapshot_step if record.case.snapshot else None
    if traced == 0:
        return []
    return [s for number, s in enumerate(record.step_seconds, 1) if number > 1 and number != traced]


def row_of(record: Record, file: str, *, seed: int) -> Row:
    """The row of a record that has a clean step.

    Raises:
        MemplanError: a model or run that memplan does not know.
    """
    config = record.case.train_config()
    model = ModelSpec.from_hf_config(record.case.hf_config)
    work = step_work(Estimate(model, config, None).program, model, config)
    run = json.dumps([record.case.hf_config, config.model_dump(mode="json")], sort_keys=True)
    digest = hashlib.sha256(f"{seed}:{run}".encode()).digest()
    return Row(record.case.id, file, config, work, min(clean_steps(record)), digest[0] / 256)
