"""Dropout of the probabilities where attention is computed op by op: fp32 with grouped heads."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from memplan.train_config import TrainConfig
from tests.ledger.compare import figures
from tests.oracle.configs import CONFIGS

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize(("batch", "tokens"), [(1, 128), (2, 96)])
@pytest.mark.parametrize("family", ["llama", "seed_oss"])
def test_what_dropout_keeps_is_the_real_one_but_for_the_width_of_its_mask(family: str, batch: int, tokens: int) -> None:
    """CUDA's fused dropout keeps a mask of one byte an element. On the oracle's CPU it is fp32, and this dropout is
    inside a C++ function, where the oracle cannot put the other in its place: the difference is those three bytes."""
    run = TrainConfig(method="qlora", stack="torch", micro_batch_size=batch, seq_len=tokens)
    config = CONFIGS[family] | {"attention_dropout": 0.1}
    wider = config["num_hidden_layers"] * batch * config["num_attention_heads"] * tokens * tokens * 3
    for figure in figures(config, run):
        alive = figure.phase == "forward" or (figure.phase == "backward" and figure.name == "peak")
        assert figure.real - figure.played == (wider if alive else 0), figure
