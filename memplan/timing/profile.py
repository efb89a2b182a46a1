"""The time constants of one's own GPU: fitted on the runs of `memplan calibrate`, kept beside its profile.

    <folder of the profiles>/<card>-time.json        where `memplan.profiles` keeps what else was learnt of the card

They replace the shipped ones for that card, and its runs then count as measured.
"""

from __future__ import annotations

import dataclasses
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan import profiles
from memplan.errors import InvalidSpecError, MemplanError
from memplan.gpus import GpuSpec, match_product
from memplan.timing.roofline import Constants, Fit, shipped

if TYPE_CHECKING:
    from memplan.calibration.record import RecordFile

MIN_ROWS = 8
"""Runs below which there is too little to learn from: the shipped constants stay."""


def fit_for(gpu: GpuSpec) -> Fit:
    """The constants for `gpu`: those of its own calibration, else the shipped ones.

    Raises:
        InvalidSpecError: there is a calibration, and it cannot be read.
    """
    for product in gpu.products:
        path = _path(product)
        try:
            if not path.is_file():
                continue
            body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            constants = Constants(**{name: float(value) for name, value in body["constants"].items()})
            held_out = {name: float(body["held_out"][name]) for name in ("rows", "median", "p90", "bias")}
            if not all(value > 0 for value in dataclasses.astuple(constants)):
                raise ValueError("a constant is not above zero")
            return Fit(gpu.name, constants, str(body["source"]), held_out)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InvalidSpecError(
                f"profile `{path}` cannot be read: {reason}", hints=["delete it and run `memplan calibrate` again"]
            ) from None
    return shipped()


def learn(file: RecordFile) -> Fit:
    """Constants of the GPU that `file` was measured on.

    The start is what was measured on the H200; arithmetic, bandwidth and host each move by one factor, as far as the
    runs pull it. The errors are those of runs left out in turn. Runs of models without a family are left out.

    Raises:
        MemplanError: the GPU is not in the table, its peaks are not known, or too little was measured.
    """
    from memplan.timing.fit import cross_validate, fit
    from memplan.timing.rows import Row, clean_steps, row_of

    environment = file.environment
    if environment is None:
        raise MemplanError("the records do not say which GPU they were measured on")
    card = match_product(environment.gpu, environment.gpu_total_bytes)
    if card is None:
        raise MemplanError(f"the peaks of `{environment.gpu}` are not known")
    rows: list[Row] = []
    for record in file.records:
        if record.status == "ok" and clean_steps(record):
            with suppress(MemplanError):
                rows.append(row_of(record, "own", seed=0))
    if len(rows) < MIN_ROWS:
        raise MemplanError(f"too few runs with a step to go by: {len(rows)}, and it takes {MIN_ROWS}")
    start = shipped().constants
    constants = fit(rows, card, start=start, together=True)
    source = f"your calibration of {environment.date}, {len(rows)} runs on {environment.gpu}"
    errors = cross_validate(rows, card, start=start, together=True)
    return Fit(card.name, constants, source, errors)


def save(fit: Fit, product: str) -> Path:
    """Writes `fit` where later estimates for the card `product` look; returns the file.

    Raises:
        MemplanError: the folder cannot be written to.
    """
    path = _path(product)
    body = {"constants": dataclasses.asdict(fit.constants), "source": fit.source, "held_out": fit.held_out}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        hints = ["`MEMPLAN_PROFILES` names another folder"]
        raise MemplanError(f"cannot write `{path}`: {error.strerror or error}", hints=hints) from None
    return path


def _path(product: str) -> Path:
    return profiles.folder() / f"{profiles.slug(product)}-time.json"
