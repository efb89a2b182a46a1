"""Loading and preparation: allocated and reserved bytes as `torch.cuda` reported them on an H200 (torch 2.11)."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures import decoder_for
from memplan.errors import MemplanError
from memplan.memory.composer import Composer
from memplan.memory.simulate import simulate
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

WORKSPACE_BYTES = 32 * 2**20  # cuBLAS on Hopper; DoRA's first norm takes it
LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 8000,
    "max_position_embeddings": 2048,
}
# allocated and reserved after loading, then after what a script does before its first step
MEASURED: list[tuple[str, dict[str, Any], int, int, int, int]] = [
    ("llama-full", {"method": "full"}, 102251520, 121634816, 102251520, 121634816),
    (
        "llama-full-amp",
        {"method": "full", "weight_dtype": "fp32", "autocast": True},
        211842048,
        213909504,
        211842048,
        213909504,
    ),
    ("llama-lora", {"method": "lora"}, 102251520, 121634816, 105741312, 125829120),
    ("llama-lora-b1", {"method": "lora", "adapter_dtype": "bf16"}, 102251520, 121634816, 103996416, 125829120),
    ("llama-lora-dora", {"method": "lora", "use_dora": True}, 102251520, 121634816, 139406336, 180355072),
    (
        "llama-lora-save",
        {"method": "lora", "modules_to_save": ["lm_head"]},
        102251520,
        121634816,
        122518528,
        142606336,
    ),
    ("llama-qlora", {"method": "qlora"}, 51065856, 60817408, 88124416, 96468992),
    ("llama-qlora-nodq", {"method": "qlora", "double_quant": False}, 52602368, 60817408, 89660928, 98566144),
    ("llama-qlora-int8", {"method": "qlora", "quant_type": "int8"}, 67496960, 85983232, 104555520, 121634816),
    (
        "llama-qlora-noprep-amp",
        {"method": "qlora", "autocast": True, "kbit_prep": False, "adapter_dtype": "bf16"},
        51065856,
        60817408,
        52810752,
        62914560,
    ),
]


def composer(**config: Any) -> Composer:
    run = TrainConfig(stack="torch", seq_len=16, **config)
    return Composer(decoder_for(ModelSpec.from_hf_config(LLAMA), run), workspace_bytes=WORKSPACE_BYTES)


@pytest.mark.parametrize(("record", "config", "loaded", "reserved", "prepared", "reserved_then"), MEASURED)
def test_loading_takes_what_it_took(
    record: str, config: dict[str, Any], loaded: int, reserved: int, prepared: int, reserved_then: int
) -> None:
    phases = simulate(composer(**config).compose()).phases[0]
    load, prepare = phases["load"], phases["prepare"]
    assert (load.allocated_bytes, load.reserved_bytes) == (loaded, reserved), record
    assert (prepare.allocated_bytes, prepare.reserved_bytes) == (prepared, reserved_then), record


def test_fp4_lies_as_nf4_does() -> None:
    """The 16 values differ, not their bytes (bitsandbytes 0.50.2 functional.py `get_4bit_type`)."""
    nf4, fp4 = (
        simulate(composer(method="qlora", quant_type=kind).compose()).phases[0]["prepare"] for kind in ("nf4", "fp4")
    )
    assert nf4 == fp4


def test_trained_whole_is_a_copy_beside_the_frozen_module() -> None:
    """PEFT 0.21.2 utils/other.py `ModulesToSaveWrapper`."""
    plain = composer(method="lora").compose().weights
    saving = composer(method="lora", modules_to_save=("lm_head", "model.norm")).compose().weights
    added = {w.name: (w.shape, w.trains) for w in saving if w.name not in {p.name for p in plain}}
    assert added == {
        "model.norm.modules_to_save.weight": ((1024,), True),
        "lm_head.modules_to_save.weight": ((8000, 1024), True),
    }
    assert [w for w in saving if w.name not in added] == plain


def test_a_quantised_layer_cannot_be_trained_whole() -> None:
    with pytest.raises(MemplanError, match=r"self_attn\.q_proj"):
        composer(method="qlora", modules_to_save=("q_proj",)).compose()


def test_trl_leaves_magnitudes_in_fp32() -> None:
    """TRL 1.16 trainer/sft_trainer.py casts the adapters of a quantised model to bf16, the magnitudes not."""
    run = TrainConfig(method="qlora", stack="trl", use_dora=True, seq_len=16)
    weights = Composer(decoder_for(ModelSpec.from_hf_config(LLAMA), run), workspace_bytes=0).compose().weights
    dtypes = {w.name.rpartition(".lora_")[2]: w.dtype.label for w in weights if ".lora_" in w.name}
    assert dtypes == {"A.weight": "bf16", "B.weight": "bf16", "magnitude_vector.weight": "fp32"}
