"""What `memplan cost --json` and `memplan plan --json` print."""

from __future__ import annotations

import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from memplan.cost import Cost
from memplan.plan import Plan, command_of, flags_of
from memplan.plan_search import Candidate
from memplan.prices import Price
from memplan.report import Report
from memplan.storage import Storage


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PriceReport(_Row):
    """One offer, and how old it is."""

    provider: str
    instance: str
    region: str
    kind: str
    count: int
    """GPUs rented together."""
    usd_per_hour: float
    """For all `count`."""
    usd_per_gpu_hour: float
    as_of: datetime.date | None
    age_days: int | None
    source: str

    @classmethod
    def of(cls, price: Price) -> Self:
        fields = {name: getattr(price, name) for name in cls.model_fields if name != "age_days"}
        return cls(**fields, age_days=price.age_days())


class StorageReport(_Row):
    num_variants: int
    base_bytes: int
    adapter_bytes: int
    full_copies_bytes: int
    adapters_bytes: int

    @classmethod
    def of(cls, storage: Storage) -> Self:
        return cls(**{name: getattr(storage, name) for name in cls.model_fields})


class CostReport(Report):
    """`memplan cost --json`. Intervals are [low, high]; times are seconds of one optimizer step unless named hours."""

    command: Literal["cost"] = "cost"
    model: str
    gpu: str
    num_tokens: int
    num_steps: int
    hours: float
    hours_interval: tuple[float, float]
    dollars: float | None
    dollars_interval: tuple[float, float] | None
    price: PriceReport | None
    step_seconds: float
    device_seconds: dict[str, float]
    host_seconds: float
    tokens_per_second: float
    mfu: float
    bound_by: str
    process_bytes: int
    fits: bool
    measured_on_this_gpu: bool
    assumptions: list[str]
    config: dict[str, Any]
    storage: StorageReport | None
    """Only with `--variants`."""

    @classmethod
    def of(cls, cost: Cost, storage: Storage | None = None) -> Self:
        apart = {"hours_interval", "price", "config", "storage", "command", "schema_version", "memplan_version"}
        same = {name: getattr(cost, name) for name in cls.model_fields if name not in apart}
        same["assumptions"] = list(cost.assumptions)
        return cls(
            **same,
            hours_interval=cost.interval,
            price=None if cost.price is None else PriceReport.of(cost.price),
            config=cost.config.model_dump(mode="json"),
            storage=None if storage is None else StorageReport.of(storage),
        )


class CandidateReport(_Row):
    """One way to run it. With `fits` false nothing was played: hours, dollars and bytes are lower bounds."""

    gpu: str
    method: str
    flags: list[str]
    shell: str
    """`flags` as one would type them."""
    hours: float
    hours_interval: tuple[float, float]
    dollars: float | None
    price: PriceReport | None
    tokens_per_second: float
    mfu: float
    bound_by: str
    process_bytes: int
    memory_bytes: int
    fits: bool
    measured_on_this_gpu: bool
    config: dict[str, Any]

    @classmethod
    def of(cls, c: Candidate) -> Self:
        apart = {"flags", "shell", "hours_interval", "price", "config"}
        return cls(
            **{name: getattr(c, name) for name in cls.model_fields if name not in apart},
            flags=list(flags_of(c)),
            shell=command_of(c),
            hours_interval=c.interval,
            price=None if c.price is None else PriceReport.of(c.price),
            config=c.config.model_dump(mode="json"),
        )


class RejectedReport(_Row):
    gpu: str
    method: str
    reason: str
    best: CandidateReport | None


class PlanReport(Report):
    """`memplan plan --json`: the front, cheapest first; the marks are positions in it."""

    command: Literal["plan"] = "plan"
    model: str
    num_tokens: int
    total_batch_size: int
    front: list[CandidateReport]
    cheapest: int | None
    fastest: int | None
    recommended: int | None
    best_of_method: dict[str, CandidateReport]
    rejected: list[RejectedReport]
    num_configurations: int
    num_played: int
    assumptions: list[str]

    @classmethod
    def of(cls, plan: Plan) -> Self:
        def place(c: Candidate | None) -> int | None:
            return None if c is None else plan.front.index(c)

        return cls(
            model=plan.model,
            num_tokens=plan.num_tokens,
            total_batch_size=plan.total_batch_size,
            front=[CandidateReport.of(c) for c in plan.front],
            cheapest=place(plan.cheapest),
            fastest=place(plan.fastest),
            recommended=place(plan.recommended),
            best_of_method={method: CandidateReport.of(c) for method, c in plan.best.items()},
            rejected=[
                RejectedReport(
                    gpu=row.gpu,
                    method=row.method,
                    reason=row.reason,
                    best=None if row.candidate is None else CandidateReport.of(row.candidate),
                )
                for row in plan.rejected
            ],
            num_configurations=plan.num_configurations,
            num_played=plan.num_played,
            assumptions=list(plan.assumptions),
        )
