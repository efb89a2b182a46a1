"""What `--json` prints: one document of a stable shape. Within a `schema_version` fields are only added.

Every size is an integer of bytes and its name ends in `_bytes`; every count begins with `num_`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from memplan.gpus import GpuSpec
from memplan.memory.runtime import Runtime
from memplan.model_spec import ModelSpec

if TYPE_CHECKING:
    from memplan.anatomy import Anatomy
    from memplan.compare import Comparison
    from memplan.estimate import Estimate


def _version() -> str:
    from memplan import __version__

    return __version__


class Report(BaseModel):
    """What all documents begin with."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    schema_version: Literal[1] = 1
    memplan_version: str = Field(default_factory=_version)


class Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelReport(Row):
    """Which model: as the estimate understood it."""

    name: str
    model_type: str
    num_params: int | None
    """Parameters of the published model; None where the catalogue does not say."""
    num_hidden_layers: int
    hidden_size: int
    source: str | None

    @classmethod
    def of(cls, spec: ModelSpec) -> Self:
        return cls(
            name=spec.label,
            model_type=spec.model_type,
            num_params=spec.num_parameters,
            num_hidden_layers=spec.num_hidden_layers,
            hidden_size=spec.hidden_size,
            source=spec.source,
        )


class GpuReport(Row):
    """One GPU; None is what no source was found for."""

    name: str
    memory_bytes: int
    nominal_gb: int | None
    generation: str
    compute_capability: str | None
    bandwidth_bytes_per_s: float | None
    bf16_flops: float | None
    fp16_flops: float | None
    fp32_flops: float | None
    tdp_watts: int | None
    supports_bf16: bool | None
    supports_flash_attention_2: bool | None
    memory_source: str
    source: str
    checked: str

    @classmethod
    def of(cls, gpu: GpuSpec) -> Self:
        return cls(**{name: getattr(gpu, name) for name in cls.model_fields})


class RuntimeReport(Row):
    """What the process takes beside reserved memory, and where that is known from."""

    beside_reserved_bytes: int
    workspace_bytes: int
    basis: str
    source: str

    @classmethod
    def of(cls, runtime: Runtime, beside_reserved_bytes: int) -> Self:
        return cls(
            beside_reserved_bytes=beside_reserved_bytes,
            workspace_bytes=runtime.workspace_bytes,
            basis=runtime.basis,
            source=runtime.source,
        )


class RunReport(Row):
    """The figures of one run; peaks are over load and the steps."""

    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    peak_phase: str
    components: dict[str, int]
    """Bytes alive at the allocated peak; they sum to `allocated_bytes`."""
    phases: dict[str, int]
    """Allocated peak of each phase."""
    num_params: int
    num_trainable_params: int
    adapter_bytes: int
    checkpoint_bytes: int
    config: dict[str, Any]
    """The run in full, as TrainConfig has it."""
    assumed: list[str]
    """Fields of `config` that the user did not give."""
    warnings: list[str]


class TermReport(Row):
    text: str
    num_bytes: int


class PartReport(Row):
    """One component explained; `terms` sum to `num_bytes`."""

    name: str
    num_bytes: int
    formula: str
    terms: list[TermReport]
    detail: str
    why: str
    source: str


class EstimateReport(RunReport, Report):
    """`memplan estimate --json`."""

    command: Literal["estimate"] = "estimate"
    model: ModelReport
    gpu: GpuReport | None
    runtime: RuntimeReport
    explanation: list[PartReport] | None
    """Only with `--explain`."""

    @classmethod
    def of(cls, estimate: Estimate, *, explained: bool = False) -> Self:
        return cls(
            model=ModelReport.of(estimate.model),
            gpu=None if estimate.gpu is None else GpuReport.of(estimate.gpu),
            runtime=RuntimeReport.of(estimate.runtime, estimate.process_bytes - estimate.reserved_bytes),
            explanation=_explanation(estimate) if explained else None,
            **run_fields(estimate),
        )


class ComparedReport(RunReport):
    """One column of a comparison."""

    weight_bytes: int
    adapter_resident_bytes: int
    gradient_bytes: int
    optimizer_state_bytes: int
    activation_bytes: int
    variants_storage_bytes: int
    """Disk for the base model and `num_variants` fine-tuned ones."""
    verdicts: dict[str, Literal["fits", "close", "does not fit"]]
    """By GPU; `close` is for `memplan fit` to decide."""


class CompareReport(Report):
    """`memplan compare --json`."""

    command: Literal["compare"] = "compare"
    model: ModelReport
    gpu: GpuReport | None
    runtime: RuntimeReport
    num_variants: int
    methods: dict[str, ComparedReport]

    @classmethod
    def of(cls, comparison: Comparison) -> Self:
        first = comparison.columns[0].estimate
        return cls(
            model=ModelReport.of(first.model),
            gpu=None if first.gpu is None else GpuReport.of(first.gpu),
            runtime=RuntimeReport.of(first.runtime, first.process_bytes - first.reserved_bytes),
            num_variants=comparison.num_variants,
            methods={
                column.estimate.config.method: ComparedReport(
                    weight_bytes=column.weight_bytes,
                    adapter_resident_bytes=column.adapter_resident_bytes,
                    gradient_bytes=column.gradient_bytes,
                    optimizer_state_bytes=column.optimizer_state_bytes,
                    activation_bytes=column.activation_bytes,
                    variants_storage_bytes=column.storage_bytes(comparison.num_variants),
                    verdicts=dict(column.verdicts),
                    **run_fields(column.estimate),
                )
                for column in comparison.columns
            },
        )


class ModelsReport(Report):
    """`memplan models --json`."""

    command: Literal["models"] = "models"
    models: list[ModelReport]


class ModelShowReport(Report):
    """`memplan models show --json`."""

    command: Literal["models show"] = "models show"
    model: dict[str, Any]
    """The ModelSpec."""
    parts: dict[str, int]
    """Parameters by part."""
    kept_bytes_per_token: dict[str, dict[str, int]]
    """By method and kind of layer, without gradient checkpointing."""
    checkpointed_bytes_per_token: dict[str, int]
    """By method, with gradient checkpointing."""
    num_layers: dict[str, int]
    """By kind of layer."""
    pitfalls: list[str]

    @classmethod
    def of(cls, spec: ModelSpec, parts: Anatomy) -> Self:
        return cls(
            model=spec.model_dump(mode="json"),
            parts=parts.parts,
            kept_bytes_per_token={method: dict(kept) for method, kept in parts.kept_per_token.items()},
            checkpointed_bytes_per_token=dict(parts.checkpointed_per_token),
            num_layers=parts.num_layers,
            pitfalls=list(parts.pitfalls),
        )


class GpusReport(Report):
    """`memplan gpus --json`."""

    command: Literal["gpus"] = "gpus"
    gpus: list[GpuReport]


def run_fields(estimate: Estimate) -> dict[str, Any]:
    config = estimate.config
    return {
        "allocated_bytes": estimate.allocated_bytes,
        "reserved_bytes": estimate.reserved_bytes,
        "process_bytes": estimate.process_bytes,
        "peak_phase": estimate.peak_phase,
        "components": estimate.components,
        "phases": estimate.phases,
        "num_params": estimate.num_params,
        "num_trainable_params": estimate.num_trainable_params,
        "adapter_bytes": estimate.adapter_bytes,
        "checkpoint_bytes": estimate.checkpoint_bytes,
        "config": config.model_dump(mode="json"),
        "assumed": [name for name in type(config).model_fields if name not in config.model_fields_set],
        "warnings": list(estimate.warnings),
    }


def _explanation(estimate: Estimate) -> list[PartReport]:
    from memplan.explain import explain

    return [
        PartReport(
            name=part.name,
            num_bytes=part.num_bytes,
            formula=part.formula,
            terms=[TermReport(text=term.text, num_bytes=term.num_bytes) for term in part.terms],
            detail=part.detail,
            why=part.why,
            source=part.source,
        )
        for part in explain(estimate)
    ]
