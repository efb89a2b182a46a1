"""Full fine-tuning, LoRA and QLoRA side by side."""

from __future__ import annotations

import dataclasses

import pytest

from memplan import MemplanError, estimate, gpus
from memplan.compare import Comparison, compare, verdicts
from memplan.fit import Fitter
from memplan.memory.allocator_config import AllocatorConfig
from memplan.train_config import METHODS

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(MODEL, {"rank": 8, "seq_len": 256, "double_quant": False}, num_variants=20)


def test_columns_are_the_estimates_of_the_methods(comparison: Comparison) -> None:
    assert [column.estimate.config.method for column in comparison.columns] == list(METHODS)
    full, lora, qlora = (column.estimate for column in comparison.columns)
    assert full.allocated_bytes == estimate(MODEL, method="full", seq_len=256).allocated_bytes
    assert lora.allocated_bytes == estimate(MODEL, rank=8, seq_len=256).allocated_bytes
    expected = estimate(MODEL, method="qlora", rank=8, seq_len=256, double_quant=False)
    assert qlora.allocated_bytes == expected.allocated_bytes


def test_what_trains_less_keeps_less(comparison: Comparison) -> None:
    full, lora, qlora = comparison.columns
    assert qlora.weight_bytes < lora.weight_bytes <= full.weight_bytes
    assert qlora.gradient_bytes <= lora.gradient_bytes < full.gradient_bytes
    assert qlora.optimizer_state_bytes <= lora.optimizer_state_bytes < full.optimizer_state_bytes


def test_storage_of_variants(comparison: Comparison) -> None:
    """Twenty full models, or one base in bf16 and twenty adapters."""
    full, lora, _ = comparison.columns
    assert full.storage_bytes(20) == 20 * full.estimate.checkpoint_bytes
    assert lora.base_bytes == 2 * estimate(MODEL, method="full").num_params
    assert lora.storage_bytes(20) == lora.base_bytes + 20 * lora.estimate.adapter_bytes


def test_cards_are_common_ones_and_the_one_asked_about(comparison: Comparison) -> None:
    assert {gpu.name for gpu in comparison.gpus} == set(gpus.COMMON)
    asked = compare(MODEL, gpu="t4")
    assert "t4" in {gpu.name for gpu in asked.gpus}
    memory = [gpu.memory_bytes for gpu in asked.gpus]
    assert memory == sorted(memory)


def test_verdicts_agree_with_fit() -> None:
    """What compare says of a card, `fit` says too; between the two lies what only `fit` decides."""
    run = estimate(MODEL, seq_len=256, gpu="2GiB")
    mib = run.process_bytes // 2**20
    sizes = [gpus.get(f"{size}MiB") for size in (mib // 2, mib - 512, mib - 64, mib - 32, mib, mib + 64, mib * 2)]
    said = verdicts(run, [*sizes, *map(gpus.get, gpus.COMMON)])
    assert set(said.values()) == {"fits", "close", "does not fit"}
    for card in [*sizes, gpus.get("rtx-4060"), gpus.get("rtx-5090")]:
        if said[card.name] != "close":
            fitter = Fitter(run.model, card, AllocatorConfig(), card.memory_bytes)
            assert fitter.verdict(run.config) == said[card.name]


def test_a_card_is_judged_by_its_own_constants() -> None:
    """Ada's context and workspaces are smaller than Hopper's."""
    h200, rtx_4090 = estimate(MODEL, gpu="h200"), estimate(MODEL, gpu="rtx-4090")
    between = dataclasses.replace(gpus.get("rtx-4090"), memory_bytes=(h200.process_bytes + rtx_4090.process_bytes) // 2)
    assert rtx_4090.process_bytes < h200.process_bytes
    assert verdicts(h200, [between]) == verdicts(rtx_4090, [between]) == {"rtx-4090": "fits"}


@pytest.mark.parametrize(
    ("fields", "num_variants", "says"),
    [
        ({"method": "lora"}, 20, "`method` is what is compared"),
        ({}, 0, "number of models"),
        ({"rank": 0}, 20, "rank"),
        ({"no_such_field": 1}, 20, "no_such_field"),
    ],
)
def test_bad_input(fields: dict[str, object], num_variants: int, says: str) -> None:
    with pytest.raises(MemplanError, match=says):
        compare(MODEL, fields, num_variants=num_variants)
