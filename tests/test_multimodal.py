"""A step on text alone of a multimodal model, its other towers taken off, against memplan's reading of its config."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig
from tests.ledger.compare import figures
from tests.ledger.design import LINEAR_NAMES
from tests.oracle.configs import CONFIGS

pytestmark = pytest.mark.oracle


def _text(family: str, **changes: Any) -> dict[str, Any]:
    return CONFIGS[family] | changes


def _rotary(*sections: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": _text("gemma3_text"),
    "gemma4": _text("gemma4_text"),
    "gemma4_unified": _text("gemma4_unified_text"),
    "llama4": _text("llama4_text"),
    "llava": _text("llama"),
    "mistral3": _text("mistral"),
    "qwen2_5_vl": _text("qwen2", model_type="qwen2_5_vl_text", **_rotary(4, 6, 6)),
    "qwen3_vl": _text("qwen3", model_type="qwen3_vl_text", **_rotary(8, 8, 8)),
}
POSITIONS_BYTES_A_TOKEN = 128
"""What Qwen-VL's three kinds of positions add to rotary tables and position ids, once a step: not played."""


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_every_phase_is_the_real_one(monkeypatch: pytest.MonkeyPatch, wrapper: str, method: Any) -> None:
    import transformers

    def from_config(config: Any, **kwargs: Any) -> Any:
        kept = {name: value for name, value in kwargs.items() if value is not None}
        model = transformers.AutoModelForImageTextToText.from_config(config, **kept)
        for tower in ("visual", "vision_tower", "multi_modal_projector"):
            if hasattr(model.model, tower):
                delattr(model.model, tower)
        return model

    if wrapper != "llama4":  # of which AutoModelForCausalLM takes the language model out
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", from_config)
    targets = LINEAR_NAMES.get(WRAPPED[wrapper]["model_type"], "all-linear") if method == "lora" else "all-linear"
    run = TrainConfig(method=method, stack="torch", micro_batch_size=2, seq_len=96, target_modules=targets)
    config = {
        "model_type": wrapper,
        "tie_word_embeddings": wrapper.startswith("gemma"),
        "text_config": WRAPPED[wrapper],
    }
    assert ModelSpec.from_hf_config(config).part_of == wrapper
    allowed = POSITIONS_BYTES_A_TOKEN * run.tokens_per_micro_batch if wrapper.startswith("qwen") else 0
    off = [f for f in figures(config, run) if abs(f.played - f.real) > allowed + 0.001 * f.real]
    assert not off, "\n".join(["", *map(str, off)])
