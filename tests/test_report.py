"""`--json` documents: shape, names, integers, sums."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memplan import Estimate, TrainConfig, __version__, catalog, estimate
from memplan.compare import compare
from memplan.gpu_table import ROWS
from memplan.report import CompareReport, EstimateReport, GpuReport, GpusReport, ModelReport, ModelsReport
from memplan.train_config import METHODS

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def run() -> Estimate:
    return estimate(MODEL, method="qlora", rank=8, gpu="rtx-4090")


@pytest.fixture(scope="module")
def document(run: Estimate) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(EstimateReport.of(run, explained=True).model_dump_json())
    return parsed


def sizes(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Every (key, value) below `value` whose key says that it is bytes or a count."""
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in sizes(inner, key)]
    if isinstance(value, list):
        return [pair for inner in value for pair in sizes(inner, name)]
    return [(name, value)] if name.endswith("_bytes") or name.startswith("num_") else []


def test_fields_of_an_estimate_are_a_contract() -> None:
    """Scripts read these: a field may be added (here too), never renamed or dropped within a schema version."""
    assert set(EstimateReport.model_fields) == {
        "schema_version",
        "memplan_version",
        "command",
        "model",
        "gpu",
        "runtime",
        "allocated_bytes",
        "reserved_bytes",
        "process_bytes",
        "peak_phase",
        "components",
        "phases",
        "num_params",
        "num_trainable_params",
        "adapter_bytes",
        "checkpoint_bytes",
        "config",
        "assumed",
        "warnings",
        "explanation",
    }


def test_every_size_is_an_integer_above_or_at_zero(document: dict[str, Any]) -> None:
    found = sizes(document)
    assert len(found) > 10
    assert all(type(value) is int and value >= 0 for _, value in found)
    assert all(type(value) is int and value >= 0 for value in document["components"].values())


def test_components_sum_to_allocated_and_tiers_grow(document: dict[str, Any]) -> None:
    assert sum(document["components"].values()) == document["allocated_bytes"]
    assert document["allocated_bytes"] <= document["reserved_bytes"] < document["process_bytes"]
    assert max(document["phases"].values()) == document["allocated_bytes"]
    assert document["process_bytes"] - document["reserved_bytes"] == document["runtime"]["beside_reserved_bytes"]


def test_the_run_is_echoed_whole_and_says_what_was_assumed(document: dict[str, Any]) -> None:
    assert document["schema_version"] == 1
    assert document["memplan_version"] == __version__
    assert document["config"]["rank"] == 8
    assert set(document["config"]) == set(TrainConfig.model_fields)
    assert set(document["assumed"]) == set(TrainConfig.model_fields) - {"method", "rank"}
    again = TrainConfig(**{name: document["config"][name] for name in document["config"]})
    assert again.model_dump() == TrainConfig(method="qlora", rank=8).model_dump()


def test_explanation_is_of_the_same_numbers(document: dict[str, Any]) -> None:
    parts = {part["name"]: part for part in document["explanation"]}
    assert {name: part["num_bytes"] for name, part in parts.items()} == document["components"]
    assert all(sum(t["num_bytes"] for t in part["terms"]) == part["num_bytes"] for part in parts.values())


def test_shape_does_not_depend_on_the_request(document: dict[str, Any]) -> None:
    other = json.loads(EstimateReport.of(estimate(MODEL, method="full")).model_dump_json())
    assert set(other) == set(document)
    assert other["gpu"] is None
    assert other["explanation"] is None
    assert other["adapter_bytes"] == 0


def test_comparison_has_each_method_in_full() -> None:
    comparison = compare(MODEL, {"rank": 8}, num_variants=3, gpu="t4")
    document = json.loads(CompareReport.of(comparison).model_dump_json())
    assert tuple(document["methods"]) == METHODS
    for method, column in document["methods"].items():
        run = estimate(MODEL, method=method, gpu="t4", **({} if method == "full" else {"rank": 8}))
        assert column["process_bytes"] == run.process_bytes
        assert column["config"]["method"] == method
        assert column["verdicts"]["t4"] == "fits"
    assert all(type(value) is int for _, value in sizes(document))


def test_models_and_gpus_keep_their_sources() -> None:
    models = ModelsReport(models=[ModelReport.of(spec) for spec in catalog.all_specs()]).model_dump(mode="json")
    assert all(model["source"] and model["num_params"] for model in models["models"])
    gpus = GpusReport(gpus=[GpuReport.of(row) for row in ROWS]).model_dump(mode="json")
    assert [gpu["name"] for gpu in gpus["gpus"]] == [row.name for row in ROWS]
    assert all(gpu["memory_source"] for gpu in gpus["gpus"])


@pytest.mark.parametrize("report", [EstimateReport, CompareReport, ModelsReport, GpusReport])
def test_documents_have_a_json_schema(report: type[EstimateReport]) -> None:
    schema = report.model_json_schema()
    assert schema["properties"]["schema_version"]["const"] == 1
    assert schema["additionalProperties"] is False
