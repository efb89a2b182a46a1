"""What a measurement file holds: JSON lines, first the environment, then one record a run.

Reading needs no torch. `legacy` reads the files of an earlier harness into the same types.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memplan.errors import MemplanError
from memplan.train_config import TrainConfig

Status = Literal["ok", "oom", "error", "timeout"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Environment(_Frozen):
    """Where a file's runs were measured. Versions of libraries that are not installed are None."""

    gpu: str
    gpu_total_bytes: int
    """What the driver reports as the card's memory (NVML total)."""
    gpu_reserved_bytes: int | None = None
    """Memory the driver keeps for itself: no process can have it."""
    driver: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    torch: str | None = None
    transformers: str | None = None
    peft: str | None = None
    bitsandbytes: str | None = None
    accelerate: str | None = None
    trl: str | None = None
    liger_kernel: str | None = None
    flash_attn: str | None = None
    python: str | None = None
    memplan: str | None = None
    date: str | None = None
    allocator_conf: str | None = None
    """PYTORCH_CUDA_ALLOC_CONF, if the user had set it."""


class Case(_Frozen):
    """One run to measure."""

    id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,120}$")
    """Names the run in tables and its trace file."""
    hf_config: dict[str, Any]
    """The model, in the keys of its config.json; what is missing takes the config class's default."""
    config: dict[str, Any]
    """The fields of a TrainConfig that were said; the others come from its stack."""
    num_steps: int = Field(default=3, ge=1, le=1000)
    use_cache: bool = False
    """`model.config.use_cache`; transformers' Trainer sets False."""
    memory_limit_bytes: int | None = Field(default=None, gt=0)
    """Emulate a smaller card: what the allocator may take (`set_per_process_memory_fraction`)."""
    warm_allocator: bool = False
    """Reserve the weights' bytes in one piece before loading, as transformers' `from_pretrained` does."""
    snapshot: bool = False
    """Write the allocation trace of the load and of `snapshot_step`."""
    snapshot_step: int = Field(default=2, ge=0)
    """0 traces the whole run in one part, from before the first allocation."""

    def train_config(self) -> TrainConfig:
        return TrainConfig(**self.config)


class PhaseFigures(_Frozen):
    """The caching allocator over one phase; peaks are reset where the phase begins.

    `step` 0 is what happens before the first step. Phases are seamless: each ends where the next begins.
    """

    step: int
    phase: str
    micro_step: int = 0
    allocated_bytes: int
    peak_allocated_bytes: int
    reserved_bytes: int
    peak_reserved_bytes: int


class DeviceReading(_Frozen):
    """The whole card as the driver sees it, at one point of a run."""

    used_bytes: int
    """NVML v2 `used`: what nvidia-smi prints (without what the driver keeps for itself)."""
    reserved_bytes: int
    """NVML v2 `reserved`: the driver's own."""
    total_bytes: int
    process_bytes: int | None = None
    """This process alone, where the driver tells (NVML running processes)."""


class OutOfMemory(_Frozen):
    phase: str
    step: int
    tried_bytes: int | None
    """Size of the request that failed, as the message words it (two decimals of MiB or GiB)."""
    allocated_bytes: int
    reserved_bytes: int


class Record(_Frozen):
    """What one run measured. Peaks are over the training steps; loading is in `phases` under step 0."""

    case: Case
    status: Status
    error: str | None = None
    oom: OutOfMemory | None = None
    phases: tuple[PhaseFigures, ...] = ()
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_phase: str | None = None
    process_bytes: int | None = None
    """Used memory of the card at the end, the driver's own share included (NVML `used` + `reserved`)."""
    device: dict[str, DeviceReading] = {}
    """Readings at `start` (before CUDA), `context` (after the first tensor), `load` and `end`."""
    num_params: int | None = None
    num_trainable_params: int | None = None
    trainable_dtypes: tuple[str, ...] = ()
    optimizer_state_bytes: int | None = None
    """Optimizer state on the card, once a storage."""
    load_seconds: float | None = None
    step_seconds: tuple[float, ...] = ()
    tokens_per_second: float | None = None
    """Of the fastest step."""
    wall_seconds: float | None = None

    @property
    def device_overhead_bytes(self) -> int | None:
        """What the card holds beyond the allocator's reserve: driver, CUDA context, kernels, libraries."""
        if self.process_bytes is None or self.peak_reserved_bytes is None:
            return None
        return self.process_bytes - self.peak_reserved_bytes


class RecordFile(_Frozen):
    """A measurement file: one environment, many runs."""

    environment: Environment | None
    records: tuple[Record, ...]


def dump_line(item: Environment | Record) -> str:
    """One line of a measurement file, fields at their default left out."""
    body: dict[str, Any] = item.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"environment": body} if isinstance(item, Environment) else body)


def read_records(path: str | Path) -> RecordFile:
    """Read a measurement file.

    Raises:
        MemplanError: the file cannot be read, or a line is not a record.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MemplanError(f"cannot read measurements from `{path}`: {error}") from error
    environment: Environment | None = None
    records: list[Record] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if isinstance(row, dict) and "environment" in row:
                environment = Environment(**row["environment"])
            else:
                records.append(_record(row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            hints = ["a measurement file is JSON lines, as `memplan calibrate` writes them"]
            raise MemplanError(f"`{path}` line {number} is not a record: {_brief(error)}", hints=hints) from error
    return RecordFile(environment=environment, records=tuple(records))


def read_cases(path: str | Path) -> tuple[Case, ...]:
    """Read a list of cases (one JSON array).

    Raises:
        MemplanError: the file cannot be read, a case is not valid, or two cases share an id.
    """
    path = Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        cases = tuple(Case(**row) for row in rows)
        for case in cases:
            case.train_config()
    except OSError as error:
        raise MemplanError(f"cannot read cases from `{path}`: {error}") from error
    except (ValueError, TypeError) as error:
        raise MemplanError(f"`{path}` is not a list of cases: {_brief(error)}") from error
    ids = [case.id for case in cases]
    if len(set(ids)) != len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})
        raise MemplanError(f"`{path}` holds two cases with the id `{twice[0]}`")
    return cases


def write_cases(cases: Iterable[Case], path: str | Path) -> None:
    rows: Iterator[str] = (json.dumps(case.model_dump(mode="json", exclude_defaults=True)) for case in cases)
    Path(path).write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def _record(row: dict[str, Any]) -> Record:
    from memplan.calibration.legacy import is_legacy, record_from_legacy

    return record_from_legacy(row) if is_legacy(row) else Record(**row)


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    return str(error).splitlines()[0] if str(error) else type(error).__name__
