"""Replays measured runs: what memplan predicts for each, and how far off it is. Needs no GPU and no torch.

The shipped records are `memplan/calibration/records/*.jsonl`; a user's own files, as `memplan calibrate` writes them,
do as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan import gpus
from memplan.calibration.compare import Comparison, Row, Summary, compare, summarise
from memplan.calibration.record import Environment, Record, RecordFile, read_records
from memplan.errors import MemplanError, UnknownNameError
from memplan.estimate import Estimate
from memplan.gpus import GpuSpec
from memplan.memory.allocator_config import AllocatorConfig
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run beside its prediction."""

    file: str
    """Name of the record file, without its suffix."""
    record: Record
    estimate: Estimate
    rows: tuple[Row, ...]
    """One a tier that was measured."""

    @property
    def family(self) -> str:
        return self.estimate.model.model_type

    @property
    def method(self) -> str:
        return self.estimate.config.method

    @property
    def stack(self) -> str:
        return self.estimate.config.stack

    @property
    def base(self) -> str:
        """What the model's weights are kept in: `bf16`, `fp32`, `nf4`, `int8`, …"""
        config = self.estimate.config
        return config.quant_type if config.method == "qlora" else config.weight_dtype

    def row(self, tier: str) -> Row | None:
        return next((row for row in self.rows if row.tier == tier), None)

    @property
    def phase_is_right(self) -> bool | None:
        """Whether the peak was predicted in the phase in which it was measured; None where that was not recorded."""
        measured = self.record.peak_phase
        if measured is None:
            return None
        return _PHASES.get(self.estimate.peak_phase, self.estimate.peak_phase) == measured


# The harness measures forward and loss as one, and calls zero_grad `zero`.
_PHASES = {"loss": "forward", "zero_grad": "zero"}


@dataclass(frozen=True)
class Validation:
    """All runs of some record files, and the sums over them."""

    runs: tuple[Run, ...]
    comparison: Comparison
    environments: Mapping[str, Environment | None]
    """What each file was measured on, by name; None where it does not say."""

    def rows(self, tier: str, runs: Iterable[Run] | None = None) -> list[Row]:
        return [row for run in (self.runs if runs is None else runs) if (row := run.row(tier)) is not None]

    def by(self, key: Callable[[Run], str]) -> dict[str, dict[str, Summary]]:
        """Summaries a tier, for each value of `key` over the runs."""
        groups: dict[str, list[Row]] = {}
        for run in self.runs:
            groups.setdefault(key(run), []).extend(run.rows)
        return {name: summarise(rows) for name, rows in sorted(groups.items())}

    def worst(self, tier: str, count: int) -> list[Row]:
        return sorted(self.rows(tier), key=lambda row: -abs(row.error))[:count]

    @property
    def share_of_right_phases(self) -> float | None:
        """Of the runs whose peak phase was recorded; None if it was of none."""
        known = [run.phase_is_right for run in self.runs if run.phase_is_right is not None]
        return sum(known) / len(known) if known else None


def records_dir() -> Path:
    return Path(__file__).resolve().parent / "calibration" / "records"


def shipped_files() -> list[Path]:
    """The record files inside the package, by name."""
    return sorted(records_dir().glob("*.jsonl"))


def validate(paths: Sequence[str | Path] = (), *, progress: Progress | None = None) -> Validation:
    """Predicts every run of the record files at `paths`, of the shipped ones if there are none.

    Raises:
        MemplanError: a file that cannot be read, or none at all.
    """
    files = [Path(path) for path in paths] or shipped_files()
    if not files:
        raise MemplanError("there are no records to replay", hints=["give a file that `memplan calibrate` wrote"])
    read = [(path, read_records(path)) for path in files]
    total = sum(len(file.records) for _, file in read)
    runs: list[Run] = []
    comparisons: list[Comparison] = []
    done = 0
    for path, file in read:
        gpu, allocator = gpu_of(file), settings_of(file)
        capacity_bytes = file.environment.gpu_total_bytes if file.environment else None
        for record in file.records:
            predictor = _Predictor(gpu, allocator)
            one = compare([record], predictor, capacity_bytes=capacity_bytes)
            comparisons.append(one)
            if one.rows:
                assert predictor.made is not None
                runs.append(Run(path.stem, record, predictor.made, one.rows))
            done += 1
            if progress is not None:
                progress(done, total)
    rows = [row for one in comparisons for row in one.rows]
    together = Comparison(
        rows=tuple(rows),
        summaries=summarise(rows),
        verdicts=tuple(v for one in comparisons for v in one.verdicts),
        unpredicted=tuple(u for one in comparisons for u in one.unpredicted),
    )
    return Validation(tuple(runs), together, {path.stem: file.environment for path, file in read})


def gpu_of(file: RecordFile) -> GpuSpec | None:
    """The GPU that a record file names, with the memory that its driver reported; None for one not in the table."""
    environment = file.environment
    if environment is None or environment.gpu is None:
        return None
    try:
        return gpus.match_product(environment.gpu, environment.gpu_total_bytes or 0)
    except (MemplanError, UnknownNameError):
        return None


def settings_of(file: RecordFile) -> AllocatorConfig | None:
    """The allocator settings that a file's runs had (PYTORCH_ALLOC_CONF); None for torch's own.

    Raises:
        MemplanError: settings that are not modelled.
    """
    environment = file.environment
    if environment is None or not environment.allocator_conf:
        return None
    return AllocatorConfig.parse(environment.allocator_conf, device_bytes=environment.gpu_total_bytes or None)


class _Predictor:
    """Predicts on one GPU, under one file's allocator settings, and keeps what it made."""

    def __init__(self, gpu: GpuSpec | None, allocator: AllocatorConfig | None) -> None:
        self.gpu = gpu
        self.allocator = allocator
        self.made: Estimate | None = None

    def __call__(self, hf_config: dict[str, Any], config: TrainConfig) -> Estimate:
        self.made = Estimate(ModelSpec.from_hf_config(hf_config), config, self.gpu, self.allocator)
        return self.made
