"""Parameters counted from the headers of safetensors files, and the warning where memplan counts others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan.estimate import estimate
from memplan.safetensors_header import Stored, stored_in
from tests.test_prequantized import TINY, folder


def write(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file that ends with its header: whoever reads on into the weights fails."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    header |= {name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def parameters_of_tiny() -> dict[str, list[int]]:
    made = estimate_of_tiny()
    return {w.name + (f".{i}" if w.name.count("layer") else ""): list(w.shape) for i, w in enumerate(made)}


def estimate_of_tiny() -> list[Any]:
    from memplan.model_spec import ModelSpec

    made = estimate(ModelSpec.from_hf_config(TINY), method="full")
    return [w for w in made.program.weights if not w.buffer]


def test_a_count_that_agrees_is_silent_and_one_that_does_not_is_named(tmp_path: Path) -> None:
    folder(tmp_path)
    shapes = parameters_of_tiny()
    write(tmp_path / "model.safetensors", shapes | {"model.rotary_emb.inv_freq": [16]})
    made = estimate(tmp_path)
    assert made.model.num_parameters == sum(w.numel for w in estimate_of_tiny())
    assert not made.warnings
    write(tmp_path / "model.safetensors", shapes | {"model.layers.0.self_attn.extra.weight": [1000, 7]})
    (warning,) = estimate(tmp_path).warnings
    assert "7,000 (" in warning
    assert "are not counted" in warning


def test_a_declared_count_is_compared_too(tmp_path: Path) -> None:
    (warning,) = estimate(folder(tmp_path, num_parameters=1_000_000)).warnings
    assert "1,000,000 parameters" in warning
    assert "too many are counted" in warning


def test_a_tied_head_that_is_stored_twice_is_no_difference(tmp_path: Path) -> None:
    folder(tmp_path, tie_word_embeddings=True)
    write(tmp_path / "model.safetensors", parameters_of_tiny())  # with its head
    assert not estimate(tmp_path).warnings


def test_shards_are_summed_and_a_missing_one_means_unknown(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write(tmp_path / "model-1.safetensors", {"a": [3, 5]})
    assert stored_in(tmp_path) is None
    write(tmp_path / "model-2.safetensors", {"b": [7], "vision_tower.c": [2, 2]})
    assert stored_in(tmp_path) == Stored(26, 4)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 20, (5).to_bytes(8, "little") + b"[1,2]", (2).to_bytes(8, "little") + b"{}"]
)
def test_a_broken_file_says_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert stored_in(tmp_path) is None


def test_names_in_an_index_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(tmp_path / "other.safetensors", {"a": [3]})
    (inner / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    assert stored_in(inner) is None


@pytest.mark.oracle
def test_a_file_of_the_safetensors_library_is_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.float16)}, str(tmp_path / "model.safetensors"))
    assert stored_in(tmp_path) == Stored(17)


def test_the_towers_of_a_multimodal_checkpoint_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": TINY}))
    shapes = {f"language_model.{name}": shape for name, shape in parameters_of_tiny().items()}
    write(tmp_path / "model.safetensors", shapes | {"vision_tower.x": [9, 9], "multi_modal_projector.y": [4]})
    made = estimate(tmp_path)
    assert made.warnings == ("only the language model of `llava` is estimated: its other towers are left out",)
