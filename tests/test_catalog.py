"""Each bundled model has a source and the parameter count of the real one, and is found by its names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memplan import catalog
from memplan.errors import InvalidSpecError, MemplanError, UnknownNameError
from memplan.estimate import estimate
from memplan.hf_config import config_keys
from memplan.hf_families import OTHER_KEYS
from memplan.train_config import TrainConfig

CATALOGUE_KEYS = {"name", "aliases", "model_type", "num_parameters", "hf_repo", "source", "notes", "left_out"}


def raw(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((catalog.spec_dir() / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", catalog.names())
def test_a_bundled_spec_is_a_config_of_known_keys_with_a_source(name: str) -> None:
    spec = catalog.load(name)
    assert spec.name == name
    assert spec.source
    assert spec.num_parameters
    known = {
        *config_keys(spec.model_type),
        *OTHER_KEYS.get(spec.model_type, ()),
        "partial_rotary_factor",
        "rotary_pct",
    }
    assert set(raw(name)) - CATALOGUE_KEYS <= known


@pytest.mark.oracle
@pytest.mark.parametrize("name", catalog.names())
def test_num_parameters_is_that_of_the_model_transformers_builds(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    spec = catalog.load(name)
    config = {key: value for key, value in raw(name).items() if key not in CATALOGUE_KEYS - {"model_type"}}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert sum(p.numel() for p in model.parameters()) == spec.num_parameters


# Counts the models' own publishers print, to the digits they print.
PUBLISHED = {
    "llama-7b": 6.7, "llama-13b": 13.0, "llama-30b": 32.5, "llama-65b": 65.2,  # arXiv 2302.13971 table 2
    "gpt2-medium": 0.355, "gpt2-xl": 1.558,  # Hugging Face model cards: 355M, 1.5B (1,557,611,200)
    "gpt3-175b": 174.6,  # arXiv 2005.14165 table D.1 (175.0 in table 2.1, rounded up)
    "deepseek-v3": 671.0, "deepseek-v2": 236.0,  # arXiv 2412.19437 and 2405.04434
    "mixtral-8x7b": 46.7, "olmoe-1b-7b": 6.9, "mpt-30b": 29.95,  # announcement, arXiv 2409.02060, card
    "gpt-oss-120b": 116.83, "gpt-oss-20b": 20.91,  # arXiv 2508.10925 table 1
    "qwen3-30b-a3b": 30.5,  # Qwen's model card
    "gemma-4-31b": 30.7, "gemma-4-26b-a4b": 25.2,  # Google's model card
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_num_parameters_is_the_published_count(name: str) -> None:
    billions = (catalog.load(name).num_parameters or 0) / 1e9
    assert billions == pytest.approx(PUBLISHED[name], rel=0.002, abs=0.05)


def test_no_spelling_means_two_models() -> None:
    owners: dict[str, str] = {}
    for name in catalog.names():
        spec = catalog.load(name)
        for spelling in (name, *spec.aliases, *([spec.hf_repo] if spec.hf_repo else [])):
            key = catalog._key(spelling)
            assert owners.setdefault(key, name) == name, spelling
            assert catalog.load(spelling).name == name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("llama-7b", "llama-7b"), ("LLaMA_7B", "llama-7b"), ("huggyllama/llama-7b", "llama-7b"),
        ("llama 1 7b", "llama-7b"), ("llama2-7b", "llama-2-7b"), ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("Llama-2-7b-hf", "llama-2-7b"), ("llama-3.1-8b", "llama-3.1-8b"), ("llama3.1-8b", "llama-3.1-8b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"), ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("gpt-3", "gpt3-175b"), ("tinyllama", "tinyllama-1.1b"), ("openai-community/gpt2", "gpt2"),
    ],
)  # fmt: skip
def test_a_model_is_found_however_it_is_spelt(spelling: str, name: str) -> None:
    assert catalog.load(spelling).name == name


def test_one_name_costs_one_file() -> None:
    code = (
        "from memplan import catalog; catalog.load('llama-7b'); catalog.load('gemma-2-9b');"
        "assert catalog._index.cache_info().currsize == 0;"
        "assert catalog._bundled.cache_info().misses == 2; assert catalog.names.cache_info().misses == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_specs_and_folder_agree() -> None:
    assert tuple(spec.name for spec in catalog.all_specs()) == catalog.names()
    assert len(catalog.names()) == len(list(catalog.spec_dir().glob("*.json")))


def test_an_installed_package_reads_the_specs_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "memplan"
    (package / "model_specs").mkdir(parents=True)
    monkeypatch.setattr(catalog, "__file__", str(package / "catalog.py"))
    assert catalog.spec_dir.__wrapped__() == package / "model_specs"
    (package / "model_specs").rmdir()
    assert catalog.spec_dir.__wrapped__() == tmp_path / "site-packages" / "model_specs"


def test_a_path_or_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 3}')
    for path in (tmp_path / "mine", str(tmp_path / "mine"), str(tmp_path / "mine" / "config.json")):
        assert catalog.load(path).num_hidden_layers == 3
    with pytest.raises(InvalidSpecError, match=r"none\.json"):
        catalog.load(str(tmp_path / "none.json"))
    with pytest.raises(InvalidSpecError, match="llama-7b"):
        catalog.load(Path("llama-7b"))  # a Path is never a name


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as caught:
        catalog.load("lama-7b")
    assert "llama-7b" in caught.value.near


@pytest.mark.parametrize(
    "text", ["", " ", "x" * 5000, "a\0b", "llama-7b/../x", "../../etc/passwd", "/", "~no-such-user"]
)
def test_a_strange_name_ends_in_an_error_for_its_user(text: str) -> None:
    with pytest.raises(MemplanError):
        catalog.load(text)


ADAPTER = {
    "peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "r": 8, "lora_alpha": 16,
    "lora_dropout": 0.05, "target_modules": ["v_proj", "q_proj"], "modules_to_save": ["lm_head"],
    "use_dora": True,
}  # fmt: skip


def test_an_adapter_folder_gives_its_settings_and_its_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    settings = catalog.adapter_settings(tmp_path)
    assert settings == {
        "rank": 8, "lora_dropout": 0.05, "target_modules": ("q_proj", "v_proj"), "use_dora": True,
        "modules_to_save": ("lm_head",),
    }  # fmt: skip
    assert TrainConfig(method="lora", **settings).rank == 8
    assert catalog.adapter_settings(tmp_path / "adapter_config.json") == settings
    assert catalog.load(tmp_path).name == "llama-2-7b"


def test_an_estimate_of_an_adapter_folder_is_of_that_adapter(tmp_path: Path) -> None:
    adapter = ADAPTER | {"modules_to_save": None, "use_dora": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for path in (str(tmp_path), tmp_path, tmp_path / "adapter_config.json"):
        run = estimate(path).config
        assert (run.method, run.rank, run.target_modules, run.lora_dropout) == ("lora", 8, ("q_proj", "v_proj"), 0.05)
    assert estimate(tmp_path, rank=4).config.rank == 4  # what the user says wins
    assert estimate(tmp_path, TrainConfig(method="qlora")).config.target_modules == ("q_proj", "v_proj")
    assert estimate(tmp_path, method="full").config.rank is None
    # A folder with both is the model in it, with the adapter's settings.
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    made = estimate(tmp_path)
    assert (made.model.num_hidden_layers, made.config.rank) == (2, 8)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"peft_type": "IA3"}, "`IA3` adapter"),
        ({"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 4}}, "`rank_pattern` is not modelled"),
        ({"peft_type": "LORA", "r": 8, "bias": "all"}, "`bias` is not modelled"),
        ({"r": 8, "base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_an_adapter_memplan_cannot_use_is_refused(tmp_path: Path, content: dict[str, object], says: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    read = catalog.adapter_settings if "peft_type" in content else catalog.load
    with pytest.raises(InvalidSpecError, match=says):
        read(tmp_path)


def cached_repository(cache: Path, config: str) -> Path:
    """`someone/tiny-llama` as huggingface_hub's cache holds it; returns its snapshot."""
    snapshot = cache / "models--someone--tiny-llama" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(config)
    refs = cache / "models--someone--tiny-llama" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    return snapshot


TINY_LLAMA = '{"model_type": "llama", "num_hidden_layers": 2}'


def test_a_hub_id_is_read_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cached_repository(tmp_path, TINY_LLAMA)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = catalog.load("someone/tiny-llama")
    assert (spec.num_hidden_layers, spec.name, spec.hf_repo, spec.num_parameters) == (
        2,
        "someone/tiny-llama",
        "someone/tiny-llama",
        None,
    )


@pytest.mark.parametrize("in_cache", [True, False])
def test_the_parameters_of_a_hub_id_are_those_its_safetensors_headers_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_cache: bool
) -> None:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.hf_api import ModelInfo

    snapshot = cached_repository(tmp_path, TINY_LLAMA)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def model_info(repo: str, *, expand: list[str], timeout: float) -> ModelInfo:
        asked.append((repo, *expand))
        return ModelInfo(id=repo, safetensors={"parameters": {"BF16": 77}, "total": 77})

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    if in_cache:
        header = b'{"w": {"dtype": "BF16", "shape": [7, 11], "data_offsets": [0, 154]}}'
        (snapshot / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert catalog.load("someone/tiny-llama").num_parameters == 77
    assert asked == ([] if in_cache else [("someone/tiny-llama", "safetensors")])
    assert any("77 parameters" in warning for warning in estimate("someone/tiny-llama").warnings)


def test_offline_says_so_at_once_and_names_the_nearest_bundled_model(tmp_path: Path) -> None:
    code = (
        "from memplan import catalog\nfrom memplan.errors import MemplanError\n"
        "try: catalog.load('someone/llama-2-7b-tuned')\n"
        "except MemplanError as error: print(error.message); print(*error.hints, sep='\\n')"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=20)
    assert out.returncode == 0, out.stderr
    message, *hints = out.stdout.splitlines()
    assert "cannot be reached" in message
    assert any("`llama-2-7b` is bundled" in hint for hint in hints)


def test_without_huggingface_hub_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MemplanError) as caught:
        catalog.load("someone/something")
    assert "pip install 'memplan[hub]'" in caught.value.hints
