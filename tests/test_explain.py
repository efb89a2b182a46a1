"""The explanation is of the played step's own numbers."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import Estimate, estimate
from memplan.alive import alive_at_peak
from memplan.explain import Part, explain

MODEL = "smollm2-135m"
RUNS: list[dict[str, Any]] = [
    {"method": "full"},
    {"method": "full", "stack": "torch", "micro_batch_size": 2},
    {"method": "lora"},
    {"method": "lora", "stack": "torch", "gradient_accumulation_steps": 2},
    {"method": "lora", "stack": "trainer", "attention": "eager", "padding": True},
    {"method": "lora", "target_modules": ("q_proj", "v_proj"), "optimizer": "adamw_8bit"},
    {"method": "qlora"},
    {"method": "qlora", "stack": "torch", "double_quant": False, "gradient_checkpointing": True},
    {"method": "qlora", "quant_type": "int8"},
]


@pytest.fixture(params=RUNS, ids=lambda run: "-".join(map(str, run.values())), scope="module")
def run(request: pytest.FixtureRequest) -> Estimate:
    return estimate(MODEL, seq_len=256, **request.param)


def parts_of(run: Estimate) -> dict[str, Part]:
    return {part.name: part for part in explain(run)}


def test_blocks_alive_are_the_ledgers_peak_component_by_component(run: Estimate) -> None:
    blocks = alive_at_peak(run.program)
    assert sum(block.num_bytes for block in blocks) == run.tensor_bytes
    by_kind: dict[str, int] = {}
    for block in blocks:
        by_kind[block.kind] = by_kind.get(block.kind, 0) + block.num_bytes
    assert by_kind == {kind: size for kind, size in run.ledger.components.items() if size}


def test_parts_are_the_components(run: Estimate) -> None:
    parts = parts_of(run)
    assert {name: part.num_bytes for name, part in parts.items()} == run.components
    assert all(part.formula and part.why and part.source for part in parts.values())


def test_pieces_are_the_models(run: Estimate) -> None:
    layers = {f"layer {index}" for index in range(run.model.num_hidden_layers)}
    pieces = {block.piece for block in alive_at_peak(run.program) if block.kind in ("activations", "loss")}
    assert pieces <= layers | {"embedding", "head"}


def test_weights_are_told_by_how_they_are_stored() -> None:
    run = estimate(MODEL, method="qlora")
    part = parts_of(run)["weights"]
    quantised = sum(w.numel for w in run.program.weights if w.stored)
    assert part.terms[0].text.startswith(f"{quantised:,} in nf4 × 0.5")
    assert any("in bf16 × 2 B" in term.text for term in part.terms)
    assert "4-bit" in part.formula


def test_adapters_are_told_matrix_by_matrix() -> None:
    run = estimate(MODEL, rank=4)
    part = parts_of(run)["adapters"]
    assert part.num_bytes == run.bytes_of("adapters")
    layers, h = run.model.num_hidden_layers, run.model.hidden_size
    assert f"{2 * layers} × 4 × ({h} + {h}) × 4 B: o_proj, q_proj" in [term.text for term in part.terms]


def test_checkpointed_layers_are_told_apart_from_the_one_recomputed() -> None:
    run = estimate(MODEL, method="lora", stack="torch", gradient_checkpointing=True)
    part = parts_of(run)["activations"]
    tokens, h = run.config.tokens_per_micro_batch, run.model.hidden_size
    assert any(f"× {tokens:,} tokens × {h:,} × 2 B" in term.text for term in part.terms)
    assert "recomputed" in part.formula
