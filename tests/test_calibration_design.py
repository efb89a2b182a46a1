"""Designs: the same for a seed, valid, within their bounds, and every family can be drawn."""

import importlib.resources
from dataclasses import replace

import pytest

from memplan import catalog, gpus
from memplan.calibration.design import draw, rough_bytes
from memplan.calibration.design_models import FAMILIES, Shape, hf_config
from memplan.calibration.design_published import SHARE, draw_published
from memplan.calibration.record import read_cases
from memplan.errors import MemplanError
from memplan.estimate import Estimate
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig
from memplan.units import GIB

DESIGNS = sorted(
    entry.name for entry in (importlib.resources.files("memplan.calibration") / "designs").iterdir()
    if entry.name.endswith(".json")
)  # fmt: skip
SHAPE = Shape(
    hidden_size=512,
    intermediate_size=1024,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=1000,
)


def test_a_seed_gives_the_same_cases_and_another_seed_others():
    first = draw(3, 40, max_bytes=70 * GIB)
    assert draw(3, 40, max_bytes=70 * GIB) == first
    assert [c.config for c in draw(4, 40, max_bytes=70 * GIB)] != [c.config for c in first]


def test_each_family_comes_once_a_round_and_meets_every_method_and_stack():
    cases = draw(5, len(FAMILIES) * 15, max_bytes=70 * GIB)
    assert len({case.id for case in cases}) == len(cases)
    rounds = [cases[i : i + len(FAMILIES)] for i in range(0, len(cases), len(FAMILIES))]
    assert all({case.hf_config["model_type"] for case in one} == set(FAMILIES) for one in rounds)
    for family in FAMILIES:
        met = {
            (case.config["method"], case.config["stack"]) for case in cases
            if case.hf_config["model_type"] == family
        }  # fmt: skip
        assert len(met) == 9


def test_every_case_is_a_run_that_can_be_made():
    for case in draw(6, 150, max_bytes=40 * GIB):
        config = case.train_config()
        assert not (config.padding and config.micro_batch_size == 1), "one row is never padded"
        if config.quant_type == "int8":
            assert not config.use_dora
        if config.stack == "trl":
            assert config.loss == "chunked"


def test_a_smaller_card_gives_smaller_cases():
    def tokens(max_bytes):
        return [case.train_config().tokens_per_micro_batch for case in draw(7, 60, max_bytes=max_bytes)]

    assert sum(tokens(10 * GIB)) < sum(tokens(70 * GIB))


def test_the_bound_can_be_an_estimate():
    asked = []

    def bytes_of(config, train_config):
        asked.append(config["model_type"])
        return train_config.tokens_per_micro_batch * GIB // 1024

    cases = draw(8, 20, max_bytes=GIB, bytes_of=bytes_of)
    assert len(asked) >= 20
    assert all(case.train_config().tokens_per_micro_batch <= 1024 for case in cases)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_written_in_keys_that_memplan_reads(family):
    spec = ModelSpec.from_hf_config(hf_config(family, SHAPE))
    assert spec.hidden_size == SHAPE.hidden_size
    assert spec.num_hidden_layers == SHAPE.num_layers
    assert spec.vocab_size == SHAPE.vocab_size
    assert spec.tie_word_embeddings == FAMILIES[family].is_tied


@pytest.mark.parametrize("name", DESIGNS)
def test_a_shipped_design_is_valid(name):
    with importlib.resources.as_file(importlib.resources.files("memplan.calibration") / "designs" / name) as path:
        cases = read_cases(path)
    for case in cases:
        ModelSpec.from_hf_config(case.hf_config)


def test_checkpointing_lowers_the_rough_bound():
    deep = replace(SHAPE, num_layers=8)
    config = TrainConfig(method="lora", stack="torch", seq_len=4096)
    kept = rough_bytes("llama", deep, config)
    assert rough_bytes("llama", deep, config.but(gradient_checkpointing=True)) < kept


def test_bounds_that_nothing_meets_are_a_users_error():
    with pytest.raises(MemplanError, match="not even a small model"):
        draw(1, 1, max_bytes=GIB)


def test_published_models_are_drawn_within_the_card_and_the_same_for_a_seed():
    card = gpus.get("t4")
    cases = draw_published(3, 6, card, max_seconds=8.0)
    assert draw_published(3, 6, card, max_seconds=8.0) == cases
    assert len({case.id.split("-", 2)[2].rsplit("-", 2)[0] for case in cases}) == 6, "a model twice"
    for case in cases:
        config = case.train_config()
        spec = ModelSpec.from_hf_config(case.hf_config)
        assert Estimate(spec, config, card).process_bytes <= SHARE * card.memory_bytes
        assert spec.max_position_embeddings is None or config.seq_len <= spec.max_position_embeddings


def test_a_card_too_small_for_so_many_published_models_says_so(monkeypatch):
    monkeypatch.setattr(catalog, "names", lambda: ["gpt2", "llama-2-7b", "opt-1.3b"])
    with pytest.raises(MemplanError, match="models can be run within these bounds"):
        draw_published(3, 5, replace(gpus.get("t4"), memory_bytes=GIB // 2))
