"""Llama 4: what PEFT, bitsandbytes and TRL make of its parts, and what its experts cost."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")

from memplan.architectures import decoder_for
from memplan.errors import MemplanError
from memplan.memory.composer import Composer
from memplan.memory.ledger import fold
from memplan.memory.program import Program
from memplan.model_spec import ModelSpec
from memplan.ops.device import HOPPER
from memplan.prequantized import storage_fields
from memplan.train_config import TrainConfig
from tests.ledger.design import LINEAR_NAMES
from tests.oracle.configs import CONFIGS
from tests.oracle.step import run
from tests.test_moe import real_adapters

FAMILY = "llama4_text"
ALL_BUT_ROUTER = LINEAR_NAMES[FAMILY]
TOKENS = 64


def program(hf_config: dict[str, Any] | None = None, **config: Any) -> Program:
    spec = ModelSpec.from_hf_config({**CONFIGS[FAMILY], **(hf_config or {})})
    return Composer(
        decoder_for(spec, TrainConfig(**({"stack": "torch", "seq_len": TOKENS} | config)), HOPPER), workspace_bytes=0
    ).compose()


def warnings_of(hf_config: dict[str, Any] | None = None, **config: Any) -> str:
    spec = ModelSpec.from_hf_config({**CONFIGS[FAMILY], **(hf_config or {})})
    return "\n".join(
        decoder_for(spec, TrainConfig(**({"stack": "torch", "seq_len": TOKENS} | config)), HOPPER).warnings()
    )


@pytest.mark.oracle
def test_all_linear_fails_in_peft_and_is_estimated_without_the_router() -> None:
    with pytest.raises(AttributeError, match="'tuple' object has no attribute 'dtype'"):
        run(CONFIGS[FAMILY], method="lora", seq=TOKENS)
    assert "fails when it is called" in warnings_of(method="lora")
    assert "fails when it is called" not in warnings_of(method="lora", target_modules=ALL_BUT_ROUTER)
    trained = [
        [w.shape for w in program(method="lora", target_modules=targets).weights if w.trains]
        for targets in ("all-linear", ALL_BUT_ROUTER)
    ]
    assert trained[0] == trained[1] == real_adapters(FAMILY, ALL_BUT_ROUTER)
    with pytest.raises(MemplanError, match="router"):
        program(method="lora", target_modules=("q_proj", "router"))


@pytest.mark.oracle
def test_a_dense_one_has_no_router_that_could_fail() -> None:
    dense = CONFIGS[FAMILY] | {"moe_layers": []}
    run(dense, method="lora", seq=TOKENS)
    assert "router" not in warnings_of({"moe_layers": []}, method="lora")


@pytest.mark.oracle
def test_trl_finds_no_backbone_in_it() -> None:
    with pytest.raises(AttributeError, match="last_hidden_state"):
        run(CONFIGS[FAMILY], loss="chunked", seq=TOKENS)
    assert "finds no backbone" in warnings_of(stack="trl")
    assert "finds no backbone" not in warnings_of(stack="trainer")


def test_every_expert_reads_every_token() -> None:
    """What the warning says is what a step keeps: hidden states, gate, up and activation, more where experts train."""
    hidden, width, layers = CONFIGS[FAMILY]["hidden_size"], CONFIGS[FAMILY]["intermediate_size"], 1

    def kept(num_experts: int, **config: Any) -> int:
        played = program({"num_local_experts": num_experts}, **config)
        return fold(played).phases[0]["loss"].end_bytes - sum(w.resident_bytes for w in played.weights)

    attention = {"method": "lora", "target_modules": ("q_proj",), "lora_dropout": 0.0}
    more = 8 * TOKENS * 2  # rows of eight more experts, bytes of an element
    routing = 8 * TOKENS * (4 + 2)  # sigmoid's result, scores by expert
    frozen = kept(16, **attention) - kept(8, **attention)
    assert frozen == layers * (more * (hidden + 2 * width + width) + routing)
    trained = kept(16, method="full") - kept(8, method="full")
    assert trained == layers * (more * (2 * hidden + 2 * width + width + width) + routing)
    assert "4 experts on every token" in warnings_of(method="full")
    told = "takes 272.00 KiB a layer, kept for backward in every layer with experts (272.00 KiB)"
    assert 4 * TOKENS * (hidden + 3 * width) * 2 == 272 * 2**10
    assert told in warnings_of(**attention)


def test_frozen_fp32_experts_are_cast_in_every_layer_under_autocast() -> None:
    text = warnings_of(method="qlora", kbit_prep=True, autocast=True, target_modules=("q_proj",))
    assert "autocast casts the frozen fp32 experts to bf16 in every forward (576.00 KiB a layer)" in text
    assert "autocast casts" not in warnings_of(method="qlora", kbit_prep=False, autocast=True)
    assert "autocast casts" not in warnings_of(method="full", weight_dtype="fp32", autocast=True)


def test_bitsandbytes_leaves_experts_and_router() -> None:
    stored = {w.name.rpartition("layers.")[2] for w in program(method="qlora").weights if w.stored}
    assert stored
    assert not [name for name in stored if "router" in name or "experts." in name]
    assert any("shared_expert.gate_proj" in name for name in stored)


def test_a_checkpoint_whose_experts_come_quantised_is_refused() -> None:
    quantised = CONFIGS[FAMILY] | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    with pytest.raises(MemplanError, match="SequentialLlama4TextExperts"):
        storage_fields(ModelSpec.from_hf_config(quantised))
    assert storage_fields(ModelSpec.from_hf_config(quantised | {"moe_layers": []}))["method"] == "qlora"
