"""Losses and stacks against figures that others published or measured, never memplan's own."""

from __future__ import annotations

from typing import Any

import pytest

import memplan
from memplan.errors import MemplanError
from memplan.ops.loss_liger import builds_logits, chunk_tokens

SMALL = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 4096,
}
LLAMA_7B = SMALL | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}

# torch.cuda.max_memory_allocated and max_memory_reserved on an H200 (torch 2.11.0+cu130, transformers 5.17, TRL 1.16,
# liger_kernel 0.8.5, 2026-11-22); two sequences of 512 tokens unless told.
MEASURED: list[tuple[dict[str, Any], dict[str, Any], int, int]] = [
    (
        LLAMA_7B,
        {"stack": "trainer", "method": "lora", "micro_batch_size": 1},
        17_634_447_872,
        18_108_907_520,
    ),
    (SMALL, {"stack": "trainer", "method": "full", "weight_dtype": "bf16"}, 622_244_352, 671_088_640),
    (SMALL, {"stack": "trainer", "method": "lora", "autocast": False}, 489_884_160, 547_356_672),
    (SMALL, {"stack": "trainer", "method": "lora", "loss": "liger"}, 361_964_544, 400_556_032),
    (SMALL, {"stack": "trl", "method": "full", "weight_dtype": "bf16"}, 512_862_720, 645_922_816),
    (SMALL, {"stack": "trl", "method": "qlora"}, 209_725_952, 247_463_936),
    (SMALL, {"stack": "trl", "method": "qlora", "kbit_prep": True}, 268_221_440, 320_864_256),
    (SMALL, {"stack": "trl", "method": "lora", "gradient_checkpointing": False}, 409_595_392, 446_693_376),
    (
        SMALL,
        {"stack": "trl", "method": "lora", "micro_batch_size": 1, "seq_len": 1024},
        266_678_784,
        314_572_800,
    ),
    (SMALL, {"stack": "torch", "method": "full", "loss": "chunked"}, 645_697_536, 750_780_416),
    (SMALL, {"stack": "torch", "method": "full", "loss": "liger"}, 579_034_112, 620_756_992),
    (SMALL, {"stack": "torch", "method": "lora", "loss": "liger"}, 411_740_160, 450_887_680),
]


@pytest.mark.parametrize(
    ("model", "run", "allocated_bytes", "reserved_bytes"),
    MEASURED,
    ids=[" ".join(map(str, run.values())) for _, run, _, _ in MEASURED],
)
def test_both_tiers_are_those_measured(
    model: dict[str, Any], run: dict[str, Any], allocated_bytes: int, reserved_bytes: int
) -> None:
    spec = memplan.ModelSpec.from_hf_config(model)
    estimate = memplan.estimate(spec, gpu="h200", **({"micro_batch_size": 2, "seq_len": 512} | run))
    assert (estimate.allocated_bytes, estimate.reserved_bytes) == (allocated_bytes, reserved_bytes)


def test_liger_chunks_as_its_source_says() -> None:
    # The example in liger_kernel 0.8.5 ops/fused_linear_cross_entropy.py.
    assert chunk_tokens(4096 * 4, 4096, 32000) == 2048
    # Vocabulary no larger than the hidden size: one chunk, never more tokens than there are.
    assert chunk_tokens(1000, 4096, 4096) == 1000


def test_liger_leaves_models_alone_that_it_does_not_know() -> None:
    assert not builds_logits("liger", "llama")
    assert builds_logits("liger", "gpt2")


def test_the_chunked_loss_refuses_an_adapter_on_the_output_head() -> None:
    # As SFTTrainer does: it multiplies by the weight itself.
    with pytest.raises(MemplanError, match="lm_head"):
        memplan.estimate(
            memplan.ModelSpec.from_hf_config(SMALL),
            stack="trl",
            method="lora",
            target_modules=("q_proj", "lm_head"),
        )
