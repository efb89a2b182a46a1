"""A model taken apart: parts as transformers names its modules, the ledger of a layer as closed forms give it."""

from __future__ import annotations

import json

import pytest

from memplan import catalog
from memplan.anatomy import anatomy, part_of
from memplan.cli import app
from tests.test_model_spec import FAMILIES, real_model, toy

ONE_OF_EACH_FAMILY = {spec.model_type: spec.label for spec in catalog.all_specs()}


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY.values())
def test_parts_sum_to_the_model_and_every_kind_of_layer_has_a_ledger(name: str) -> None:
    spec = catalog.load(name)
    taken = anatomy(spec)
    assert sum(taken.parts.values()) == spec.num_parameters
    assert taken.parts["embedding"] >= spec.vocab_size * (spec.word_embed_proj_dim or spec.hidden_size)
    assert ("head" in taken.parts) == (not spec.tie_word_embeddings)
    assert ("experts" in taken.parts) == spec.is_moe
    assert sum(taken.num_layers.values()) == spec.num_hidden_layers
    for method, by_kind in taken.kept_per_token.items():
        assert set(by_kind) == set(taken.num_layers)
        assert all(size > taken.checkpointed_per_token[method] > 0 for size in by_kind.values())


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_parts_of_the_real_modules_are_told_apart(model_type: str) -> None:
    from torch import nn

    model = real_model(toy(model_type))
    norms = {n for n, m in model.named_modules() if "Norm" in type(m).__name__}
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        assert (part_of(name) == "norms") == (module in norms), name
        embeds = isinstance(model.get_submodule(module), nn.Embedding) or "project_" in module
        assert (part_of(name) == "embedding") == embeds, name
    assert (
        part_of(f"{next(n for n, m in model.named_modules() if m is model.get_output_embeddings())}.weight") == "head"
    )


def test_the_ledger_of_llama_is_that_of_the_closed_form() -> None:
    """Bytes a token as measured with saved_tensors_hooks: h hidden, q and k/v widths, i MLP width, a heads, r rank."""
    for name in ("llama-7b", "llama-3.1-8b"):
        spec = catalog.load(name)
        h, i, a, r = spec.hidden_size, spec.intermediate_size, spec.num_attention_heads, 16
        q, kv = a * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        taken = anatomy(spec)
        # SFTTrainer's mask of ones and no more: sdpa runs without one
        assert taken.kept_per_token["full"] == {"full_attention": 26 * h + 4 * q + 4 * kv + 8 * i + 4 * a + 8}
        assert taken.kept_per_token["lora"] == {"full_attention": 18 * h + 6 * q + 4 * kv + 8 * i + 4 * a + 8 + 14 * r}
        assert taken.checkpointed_per_token == {"full": 4 * h, "lora": 2 * h, "qlora": 2 * h}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mixtral-8x7b", "the experts stay in bf16"),
        ("gpt-j-6b", "transformers has no sdpa attention"),
        ("gemma-3-4b", "vision tower is left out"),
        ("gemma-2-2b", "logits a token"),
        ("qwen3-0.6b", "% of the parameters unquantised"),
        ("deepseek-v3", "published in fp8"),
    ],
)
def test_pitfalls_are_told(name: str, told: str) -> None:
    assert any(told in pitfall for pitfall in anatomy(catalog.load(name)).pitfalls)


def test_models_show_tells_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["models", "show", "mixtral-8x7b", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parts"]["experts"] == 32 * 8 * 3 * 4096 * 14336
    assert document["pitfalls"]
    assert app.run(["models", "show", "mixtral-8x7b"]) == 0
    shown = capsys.readouterr().out
    for words in ("experts", "32 × full_attention with experts", "with gradient checkpointing", "pitfall  "):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80
