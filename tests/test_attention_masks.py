"""Masks and rotary tables by kind of layer, and what cuDNN's attention asks for, against traces of an H200."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures import decoder_for
from memplan.dtypes import DType
from memplan.memory.composer import Composer
from memplan.memory.ledger import fold
from memplan.model_spec import ModelSpec
from memplan.ops.cudnn import backward_workspace_bytes
from memplan.ops.tensor import Machine
from memplan.train_config import TrainConfig
from tests.oracle.configs import CONFIGS

TOKENS = 128
SIZES = CONFIGS["llama"]


def activations(batch: int = 1, **config: Any) -> int:
    """Bytes alive when a full fine-tuning step has its loss, beyond what was there before."""
    spec = ModelSpec.from_hf_config({**SIZES, **config})
    run = TrainConfig(method="full", stack="torch", micro_batch_size=batch, seq_len=TOKENS)
    phases = fold(Composer(decoder_for(spec, run), workspace_bytes=0).compose()).phases
    return phases[1]["loss"].end_bytes - phases[0]["zero_grad"].end_bytes


def test_a_window_longer_than_the_sequence_needs_no_mask() -> None:
    assert activations(model_type="mistral", sliding_window=TOKENS + 1) == activations(model_type="llama")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_window_makes_every_layer_keep_its_mask_and_repeated_heads(batch: int) -> None:
    """transformers masking_utils.py `_ignore_causal_mask_sdpa`: a window as long as the sequence counts."""
    more = activations(batch, model_type="mistral", sliding_window=TOKENS) - activations(batch, model_type="llama")
    mask = batch * TOKENS * TOKENS * 2
    repeated = 2 * batch * TOKENS * (8 - 4) * 32 * 2
    assert more == 2 * (mask + repeated)


def test_only_sliding_layers_keep_a_mask() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = {"model_type": "olmo3", "pad_token_id": 0, "sliding_window": 64}
    both = activations(**config, layer_types=["sliding_attention"] * 2)
    one = activations(**config, layer_types=kinds)
    none = activations(**config, layer_types=["full_attention"] * 2)
    tables = 2 * TOKENS * 32 * 4  # cos and sin in fp32, one pair more where there are two kinds
    assert both - none == 2 * (one - tables - none)


def test_clipped_projections_are_kept_twice() -> None:
    config = {"model_type": "olmo", "pad_token_id": 0}
    copies = TOKENS * (8 + 4 + 4) * 32 * 2
    assert activations(**config, clip_qkv=8.0) - activations(**config) == 2 * copies


# Requests of `_cudnn_attention_backward` in traces of steps with 2 sequences of 512 tokens and 16 heads.
@pytest.mark.parametrize(
    ("num_key_value_heads", "width", "value_width", "num_bytes"),
    [
        (4, 64, 64, 8_454_400),
        (16, 64, 64, 4_260_096),
        (4, 128, 128, 16_843_008),
        (16, 128, 128, 8_454_400),
        (16, 96, 64, 6_357_248),
    ],
)
def test_the_backward_workspace_is_the_traced_one(
    num_key_value_heads: int, width: int, value_width: int, num_bytes: int
) -> None:
    m = Machine()
    q = m.empty((2, 16, 512, width), DType.bf16)
    k = m.empty((2, num_key_value_heads, 512, width), DType.bf16)
    v = m.empty((2, num_key_value_heads, 512, value_width), DType.bf16)
    assert backward_workspace_bytes(q, k, v) == num_bytes
