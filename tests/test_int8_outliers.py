"""Columns that LLM.int8() keeps: the expected number against a freshly initialised model's, counted."""

import math

import pytest

from memplan.architectures import decoder_for
from memplan.architectures.builder import Builder
from memplan.architectures.int8_outliers import outlier_columns
from memplan.architectures.shared import Shared
from memplan.model_spec import ModelSpec
from memplan.ops.tensor import Machine
from memplan.train_config import TrainConfig

CONFIG = TrainConfig(method="qlora", quant_type="int8", micro_batch_size=2, seq_len=256)


def llama(hidden_size: int, initializer_range: float = 0.02) -> ModelSpec:
    return ModelSpec.from_hf_config(
        {
            "model_type": "llama",
            "hidden_size": hidden_size,
            "intermediate_size": 3 * hidden_size,
            "num_attention_heads": 8,
            "initializer_range": initializer_range,
        }
    )


def test_what_a_norm_gives_holds_none_and_wider_models_hold_more_behind_the_gate() -> None:
    assert outlier_columns(llama(4096), CONFIG, "self_attn.q_proj", 4096, 1.0) == 0
    counts = [outlier_columns(llama(h), CONFIG, "mlp.down_proj", 3 * h, 1.0) / h for h in (512, 1024, 2048, 4096, 8192)]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert 2.9 < counts[-1] <= 3


def test_all_columns_of_a_stream_that_is_not_normed_deep_down() -> None:
    counts = [outlier_columns(llama(768), CONFIG, "self_attn.q_proj", 768, 2.0 * depth) for depth in (0, 1, 2, 4, 16)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 768


@pytest.mark.oracle
@pytest.mark.parametrize("gated", [True, False])
def test_columns_behind_an_activation_are_those_of_random_weights(gated: bool) -> None:
    """Normed rows through random projections: counted, and expected to five standard deviations of a binomial."""
    torch = pytest.importorskip("torch")
    hidden, width, rows = 1024, 4096, 512
    spec = llama(hidden, 0.03)
    made = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(rows, hidden, generator=made), dim=1) * math.sqrt(hidden)
    g = torch.nn.functional.silu(x @ (0.03 * torch.randn(hidden, width, generator=made)))
    if gated:
        g = g * (x @ (0.03 * torch.randn(hidden, width, generator=made)))
    counted = int((g.abs() >= 6).any(0).sum())
    config = TrainConfig(method="qlora", quant_type="int8", seq_len=rows)
    expected = outlier_columns(spec, config, "mlp.down_proj" if gated else "mlp.fc2", width, 1.0)
    share = expected / width
    assert abs(counted - expected) <= 5 * math.sqrt(width * share * (1 - share)) + 0.02 * width


@pytest.mark.oracle
@pytest.mark.parametrize("scales", [True, False])
def test_columns_of_gemma3n_are_those_of_the_real_model(monkeypatch: pytest.MonkeyPatch, scales: bool) -> None:
    """Cut gates give few, the streams behind the layers all; the layers' own inputs none while their scale is zero."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = {
        "model_type": "gemma3n_text", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2000, "laurel_rank": 32,
        "vocab_size_per_layer_input": 2000, "hidden_size_per_layer_input": 128, "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.95, 0.5, 0.0, 0.0], "initializer_range": 0.03, "altup_correct_scale": scales,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config))
    counted: dict[str, int] = {}

    def counts(name: str):
        def hook(module, args) -> None:
            counted[name] = int((args[0].flatten(0, 1).abs() >= 6).any(0).sum())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", "_coefs")):
            module.register_forward_pre_hook(counts(name))
    with torch.no_grad():
        model(input_ids=torch.randint(3, 2000, (2, 256)), use_cache=False)
    expected: dict[str, int] = {}
    prefix = ""

    def expects(spec, config, name, *args) -> int:
        expected[prefix + name] = outlier_columns(spec, config, name, *args)
        return expected[prefix + name]

    monkeypatch.setattr("memplan.architectures.builder.outlier_columns", expects)
    spec = ModelSpec.from_hf_config(hf_config)
    decoder, build = decoder_for(spec, CONFIG), Builder(spec, CONFIG, Machine())
    decoder.enter(build, decoder.embed(build))
    decoder.final_norm(build)
    for index in range(spec.num_hidden_layers):
        prefix = f"model.layers.{index}."
        decoder.layer(Builder(spec, CONFIG, Machine()), decoder.layer_kind(index), Shared())
    assert set(expected) == set(counted)
    for name, found in counted.items():
        width = model.get_submodule(name).in_features
        share = expected[name] / width
        assert abs(expected[name] - found) <= 5 * math.sqrt(width * share * (1 - share)) + 0.02 * width, name
    assert counted["model.altup_unembed_projections.0"] == 1024
    cut, dense = (counted[f"model.layers.{layer}.mlp.down_proj"] for layer in (0, 2))
    assert cut < 0.1 * dense


@pytest.mark.oracle
def test_columns_that_gemma4_adds_layers_own_inputs_by_are_those_of_the_real_model() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = {
        "model_type": "gemma4_text", "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "global_head_dim": 64, "vocab_size": 2000,
        "vocab_size_per_layer_input": 2000, "hidden_size_per_layer_input": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config))
    counted: dict[str, int] = {}

    def counts(name: str):
        def hook(module, args) -> None:
            counted[name] = int((args[0].flatten(0, 1).abs() >= 6).any(0).sum())

        return hook

    for name, module in model.named_modules():
        if name.endswith(("per_layer_input_gate", "per_layer_projection")):
            module.register_forward_pre_hook(counts(name))
    with torch.no_grad():
        model(input_ids=torch.randint(1, 2000, (2, 256)), use_cache=False)
    spec = ModelSpec.from_hf_config(hf_config)
    assert len(counted) == 12
    for name, found in counted.items():
        width = 1024 if name.endswith("gate") else 128
        variance = 3 * int(name.split(".")[2]) + 2 + 0.02**2 * 1024
        expected = outlier_columns(spec, CONFIG, name, width, variance)
        share = expected / width
        assert abs(expected - found) <= 5 * math.sqrt(width * share * (1 - share)) + 0.02 * width, name
    assert 0 < counted["model.layers.0.per_layer_input_gate"] < 100
    assert counted["model.layers.5.per_layer_input_gate"] == 1024
    # one kind a layer, each with its own variance
    kinds = {decoder_for(spec, CONFIG).layer_kind(index) for index in range(6)}
    assert len(kinds) == 6
