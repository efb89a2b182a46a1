"""The smallest real model of each family, in its true widths, against the real libraries' step on fake tensors.

Four layers by default; MEMPLAN_TRUE_DEPTH=1 runs all of them (some minutes: the 61 layers of deepseek-v3 take two).
"""

from __future__ import annotations

import os
from typing import Any
from zlib import crc32

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("trl")

from memplan import catalog
from memplan.train_config import Method, Stack, TrainConfig
from tests.ledger.compare import figures

pytestmark = pytest.mark.oracle

TOLERANCE = 0.001
NUM_LAYERS = 4
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers")
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
STACKS: tuple[Stack, ...] = ("torch", "trainer", "trl")


def smallest_of_each_family() -> list[str]:
    found: dict[str, tuple[int, str]] = {}
    for name in catalog.names():
        spec = catalog.load(name)
        assert spec.num_parameters is not None
        found[spec.model_type] = min(found.get(spec.model_type, (2**62, "")), (spec.num_parameters, name))
    return sorted(name for _, name in found.values())


def cut(hf_config: dict[str, Any]) -> dict[str, Any]:
    """The model's first layers, without dropout of the probabilities: test_attention_dropout.py."""
    hf_config = hf_config | {"attention_dropout": 0.0}
    if os.environ.get("MEMPLAN_TRUE_DEPTH"):
        return hf_config
    depth = next(hf_config[name] for name in DEPTHS if name in hf_config)
    short = {
        name: value[:NUM_LAYERS] if isinstance(value, list) and len(value) == depth else value
        for name, value in hf_config.items()
    }
    if hf_config.get("num_kv_shared_layers"):  # half of them, so that each borrows from one of its kind
        short |= {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return {name: min(value, NUM_LAYERS) if name in DEPTHS else value for name, value in short.items()}


@pytest.mark.parametrize("name", smallest_of_each_family())
def test_real_models_are_played_as_they_run(name: str) -> None:
    """Each with one of the methods and stacks, which one its name decides."""
    number = crc32(name.encode())
    config = TrainConfig(method=METHODS[number % 3], stack=STACKS[number // 3 % 3], seq_len=1024)
    off = [figure for figure in figures(cut(catalog.source_config(name)), config) if abs(figure.error) > TOLERANCE]
    assert not off, "\n".join(["", *map(str, off)])
