"""Mixtures of experts: which parameters PEFT adapts, what the user is told, what does not depend on the routing."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures import decoder_for
from memplan.errors import MemplanError
from memplan.memory.composer import Composer
from memplan.memory.ledger import fold
from memplan.memory.program import Program
from memplan.model_spec import ModelSpec
from memplan.ops.device import HOPPER
from memplan.train_config import TrainConfig
from tests.oracle.configs import CONFIGS
from tests.oracle.model import build

FAMILIES = (
    "mixtral",
    "qwen3_moe",
    "qwen2_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "qwen3_next",
)
PROJECTIONS = ("q_proj", "kv_b_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def program(family: str, *, hf_config: dict[str, Any] | None = None, **config: Any) -> Program:
    spec = ModelSpec.from_hf_config({**CONFIGS[family], **(hf_config or {})})
    run = TrainConfig(stack="torch", seq_len=64, **config)
    return Composer(decoder_for(spec, run, HOPPER), workspace_bytes=0).compose()


def warnings_of(family: str, *, hf_config: dict[str, Any] | None = None, **config: Any) -> str:
    spec = ModelSpec.from_hf_config({**CONFIGS[family], **(hf_config or {})})
    return "\n".join(decoder_for(spec, TrainConfig(stack="torch", seq_len=64, **config)).warnings())


def real_adapters(family: str, targets: str | tuple[str, ...]) -> list[tuple[int, ...]]:
    model, _ = build(
        CONFIGS[family],
        method="lora",
        weight_dtype="bf16",
        attention="sdpa",
        rank=16,
        target_modules=targets,
        lora_dropout=0.0,
        use_dora=False,
        modules_to_save=(),
        double_quant=True,
        kbit_prep=True,
        adapter_dtype="fp32",
        gradient_checkpointing=False,
        reentrant=False,
    )
    return [tuple(p.shape) for p in model.parameters() if p.requires_grad]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", ["all-linear", PROJECTIONS], ids=["all-linear", "named"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_those_of_peft_in_its_order(family: str, targets: str | tuple[str, ...]) -> None:
    played = program(family, method="lora", target_modules=targets)
    assert [w.shape for w in played.weights if w.trains] == real_adapters(family, targets)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_part_of_fused_projections_is_refused_as_peft_refuses_it(family: str) -> None:
    part = "w1" if family == "mixtral" else "gate_proj"
    with pytest.raises(MemplanError, match="gate_up_proj"):
        program(family, method="lora", target_modules=(part,))


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_adapters_of_experts_take_neither_dropout_nor_dora(option: dict[str, Any]) -> None:
    with pytest.raises(MemplanError, match=next(iter(option))):
        program("mixtral", method="lora", **option)
    program("mixtral", method="lora", target_modules=("q_proj", "v_proj"), lora_dropout=0.1)


def test_experts_stay_unquantised_and_become_fp32_with_kbit_preparation() -> None:
    def expert_bytes(**config: Any) -> int:
        weights = program("mixtral", method="qlora", **config).weights
        return sum(w.resident_bytes for w in weights if w.name.endswith(("gate_up_proj", "down_proj")))

    elements = 2 * 4 * 3 * 704 * 256  # layers, experts, projections
    assert expert_bytes(kbit_prep=False) == 2 * elements
    assert expert_bytes(kbit_prep=True) == 4 * elements


def test_a_warning_tells_bytes_of_what_quantisation_leaves_and_adapters_copy() -> None:
    text = warnings_of("mixtral", method="qlora", kbit_prep=True)
    assert "8.25 MiB), and prepare_model_for_kbit_training casts them to fp32 (16.50 MiB)" in text
    assert "8.25 MiB a layer, kept for backward in all 2 layers (16.50 MiB)" in text
    assert "one layer at a time" in warnings_of("mixtral", method="lora", gradient_checkpointing=True)
    assert "stay frozen" in warnings_of("gpt_oss", method="lora")
    assert "shared experts get no adapter" in warnings_of("deepseek_v2", method="lora")
    assert warnings_of("mixtral", method="full") == ""
    assert warnings_of("mixtral", method="lora", target_modules=("q_proj",)) == ""


def test_adapters_copy_the_experts_of_every_layer_unless_checkpointed() -> None:
    """What the warning says is what the step holds."""
    copy = 2 * 4 * 3 * 704 * 256  # bytes of one layer's experts in bf16

    def peak(layers: int, **config: Any) -> int:
        played = program("mixtral", method="lora", rank=1, hf_config={"num_hidden_layers": layers}, **config)
        resident = sum(w.resident_bytes for w in played.weights)
        return fold(played).peak_bytes - resident

    assert peak(4) - peak(3) > copy
    assert peak(4, gradient_checkpointing=True) - peak(3, gradient_checkpointing=True) < copy // 4
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert peak(4, target_modules=attention) - peak(3, target_modules=attention) < copy


def test_the_load_balancing_loss_keeps_one_tensor_of_routing_a_layer() -> None:
    def end_of_forward(**hf_config: Any) -> int:
        played = program("qwen3_moe", method="full", hf_config={"num_hidden_layers": 3, **hf_config})
        return fold(played).phases[0]["loss"].end_bytes

    tokens, experts, itemsize = 64, CONFIGS["qwen3_moe"]["num_experts"], 2
    assert end_of_forward(output_router_logits=True) - end_of_forward() == 3 * tokens * experts * itemsize


@pytest.mark.parametrize("family", FAMILIES)
def test_more_experts_cost_weights_and_little_else(family: str) -> None:
    """Tokens are sorted and multiplied together, so activations do not grow with the number of experts."""
    key = {
        "qwen3_moe": "num_experts",
        "qwen2_moe": "num_experts",
        "olmoe": "num_experts",
        "qwen3_next": "num_experts",
    }.get(family)
    key = key or ("n_routed_experts" if family.startswith(("deepseek", "glm")) else "num_local_experts")

    def activations(num_experts: int) -> int:
        played = program(family, method="full", hf_config={key: num_experts}, optimizer="sgd")
        phases = fold(played).phases[0]
        return phases["loss"].end_bytes - sum(w.resident_bytes for w in played.weights)

    few, many = activations(8), activations(32)
    routing_bytes = 2 * 64 * 32 * 4 * 4  # layers, tokens, experts, fp32, and a few tensors of them
    assert 0 <= many - few <= routing_bytes
