"""Predicted against measured, tier by tier. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from memplan.calibration.record import Record
from memplan.errors import MemplanError
from memplan.train_config import TrainConfig

TIERS = ("allocated", "reserved", "process")
DANGEROUS_SHARE = 0.005
"""An under-estimate beyond this share of the measured bytes may turn a false "fits" into an out-of-memory."""


class Prediction(Protocol):
    """What `predict` returns; an `Estimate` is one."""

    @property
    def allocated_bytes(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def process_bytes(self) -> int: ...


Predict = Callable[[dict[str, Any], TrainConfig], Prediction]


@dataclass(frozen=True)
class Row:
    """One run and one tier. `error` is (predicted - measured) / measured: below 0 is an under-estimate."""

    case_id: str
    tier: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        return (self.predicted_bytes - self.measured_bytes) / self.measured_bytes

    @property
    def is_dangerous(self) -> bool:
        return self.error < -DANGEROUS_SHARE


@dataclass(frozen=True)
class Summary:
    """Errors of one tier over all runs, as shares of the measured bytes.

    `mean`, `median` and `worst` are of the absolute error (`worst` with its sign), `bias` of the signed one.
    """

    tier: str
    num_runs: int
    mean: float
    median: float
    worst: float
    worst_case_id: str
    bias: float
    num_dangerous: int


@dataclass(frozen=True)
class Unpredicted:
    """A run that memplan refused to predict, with its reason."""

    case_id: str
    reason: str


@dataclass(frozen=True)
class FitVerdict:
    """A run on a card with a limit: whether it ran, and whether the prediction said so."""

    case_id: str
    limit_bytes: int
    predicted_bytes: int
    ran: bool

    @property
    def predicted_fits(self) -> bool:
        return self.predicted_bytes <= self.limit_bytes

    @property
    def is_false_fit(self) -> bool:
        return self.predicted_fits and not self.ran


@dataclass(frozen=True)
class Comparison:
    rows: tuple[Row, ...]
    summaries: dict[str, Summary]
    verdicts: tuple[FitVerdict, ...]
    unpredicted: tuple[Unpredicted, ...]


def compare(records: Iterable[Record], predict: Predict, *, capacity_bytes: int | None = None) -> Comparison:
    """Hold `predict(hf_config, train_config)` against every run.

    Runs that ended well give a row a tier; under a memory limit only `allocated`, because an allocator that
    meets its limit gives cached memory back and reserves less than it would have.
    Runs with a memory limit give a verdict: whether `reserved` was predicted to stay within it. Runs that ran
    out of memory without one give a verdict on `process` against `capacity_bytes`, where that is told (what
    the card has, the driver's own share included).
    """
    rows: list[Row] = []
    verdicts: list[FitVerdict] = []
    unpredicted: list[Unpredicted] = []
    for record in records:
        if record.status not in ("ok", "oom"):
            continue
        case = record.case
        try:
            prediction = predict(case.hf_config, case.train_config())
        except MemplanError as error:
            unpredicted.append(Unpredicted(case.id, error.message))
            continue
        ran = record.status == "ok"
        if case.memory_limit_bytes is not None:
            verdicts.append(FitVerdict(case.id, case.memory_limit_bytes, prediction.reserved_bytes, ran))
        elif not ran and capacity_bytes is not None:
            verdicts.append(FitVerdict(case.id, capacity_bytes, prediction.process_bytes, ran))
        if ran:
            rows.extend(_rows(record, prediction))
    return Comparison(tuple(rows), summarise(rows), tuple(verdicts), tuple(unpredicted))


def summarise(rows: Iterable[Row]) -> dict[str, Summary]:
    """A summary a tier that has rows, keyed by tier."""
    all_rows = list(rows)
    summaries = {}
    for tier in TIERS:
        of_tier = [row for row in all_rows if row.tier == tier]
        if not of_tier:
            continue
        errors = [row.error for row in of_tier]
        worst = max(of_tier, key=lambda row: abs(row.error))
        summaries[tier] = Summary(
            tier=tier,
            num_runs=len(of_tier),
            mean=statistics.fmean(abs(error) for error in errors),
            median=statistics.median(abs(error) for error in errors),
            worst=worst.error,
            worst_case_id=worst.case_id,
            bias=statistics.fmean(errors),
            num_dangerous=sum(row.is_dangerous for row in of_tier),
        )
    return summaries


def _rows(record: Record, prediction: Prediction) -> Iterable[Row]:
    measured = {
        "allocated": (prediction.allocated_bytes, record.peak_allocated_bytes),
        "reserved": (prediction.reserved_bytes, record.peak_reserved_bytes),
        "process": (prediction.process_bytes, record.process_bytes),
    }
    limited = record.case.memory_limit_bytes is not None
    for tier, (predicted, was) in measured.items():
        if was and not (limited and tier != "allocated"):
            yield Row(record.case.id, tier, predicted, was)
