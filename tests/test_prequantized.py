"""A checkpoint that comes quantised is loaded as it is stored, whatever is asked: memplan follows or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan import catalog
from memplan.compare import compare
from memplan.errors import MemplanError
from memplan.estimate import estimate
from memplan.fit import fit
from memplan.sweep import sweep
from memplan.train_config import TrainConfig

TINY = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 1000,
}  # fmt: skip
BNB_4BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def folder(tmp_path: Path, **more: Any) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY | more))
    return tmp_path


@pytest.mark.parametrize(
    ("stored", "run"),
    [
        (BNB_4BIT, {"quant_type": "nf4", "double_quant": False}),
        (BNB_4BIT | {"bnb_4bit_use_double_quant": True}, {"quant_type": "nf4", "double_quant": True}),
        ({"load_in_4bit": True}, {"quant_type": "fp4", "double_quant": False}),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_type": "int8"}),
    ],
)
def test_a_bitsandbytes_base_is_qlora_as_it_is_stored(
    tmp_path: Path, stored: dict[str, Any], run: dict[str, Any]
) -> None:
    path = folder(tmp_path, quantization_config=stored)
    made = estimate(path)
    asked = estimate(folder(tmp_path), method="qlora", **run)
    assert made.config.method == "qlora"
    assert made.allocated_bytes == asked.allocated_bytes
    folder(tmp_path, quantization_config=stored)
    assert estimate(path, TrainConfig(rank=4)).config.rank == 4
    assert fit(path, gpu="24GiB").estimate.config == made.config
    assert sweep(path, {"rank": [16]}).points[0].estimate.config.quant_type == run["quant_type"]


@pytest.mark.oracle
def test_defaults_of_what_a_stored_config_leaves_out_are_those_of_transformers() -> None:
    from transformers import BitsAndBytesConfig

    stored = BitsAndBytesConfig(load_in_4bit=True)
    assert (stored.bnb_4bit_quant_type, stored.bnb_4bit_use_double_quant) == ("fp4", False)


@pytest.mark.parametrize(
    "run", [{"method": "full"}, {"method": "lora"}, {"method": "qlora", "quant_type": "fp4"}, {"double_quant": True}]
)
def test_a_run_that_contradicts_the_storage_is_refused(tmp_path: Path, run: dict[str, Any]) -> None:
    path = folder(tmp_path, quantization_config=BNB_4BIT)
    with pytest.raises(MemplanError, match=r"comes quantised \(nf4, no double quantisation\)"):
        estimate(path, **run)
    with pytest.raises(MemplanError, match="comes quantised"):
        compare(path)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "compressed-tensors"])
def test_a_storage_that_is_not_modelled_is_refused_with_a_way_out(tmp_path: Path, method: str) -> None:
    path = folder(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(MemplanError, match=f"`{method}`, which is not modelled") as caught:
        estimate(path, method="qlora")
    assert "quantised from" in caught.value.hints[0]
    assert catalog.load(path).hidden_size == 256  # its sizes can be shown all the same


@pytest.mark.parametrize(("method", "loader"), [("fp8", "FineGrainedFP8Config"), ("mxfp4", "Mxfp4Config")])
def test_fp8_and_mxfp4_are_estimated_dequantised_and_that_is_said(tmp_path: Path, method: str, loader: str) -> None:
    made = estimate(folder(tmp_path, quantization_config={"quant_method": method}), method="lora")
    assert any(f"`{loader}(dequantize=True)`" in warning for warning in made.warnings)
    assert made.allocated_bytes == estimate(folder(tmp_path), method="lora").allocated_bytes
