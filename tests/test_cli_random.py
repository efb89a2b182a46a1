"""Whatever options are thrown at the command, it answers or says in one line what is wrong; never a crash."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.architectures import FAMILIES
from memplan.cli import app
from memplan.cli.options import RUN_OPTIONS
from memplan.hf_config import config_keys

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def command(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = app.run(arguments)
    return status, out.getvalue(), err.getvalue()


LIKELY = {
    "method": ["full", "lora", "qlora"],
    "stack": ["torch", "trainer", "trl"],
    "target_modules": ["all-linear", "q_proj,v_proj", "lm_head", "nothing", "gate_proj", "mlp", "0.self_attn.q_proj"],
    "quant_type": ["nf4", "fp4", "int8"],
    "attention": ["eager", "sdpa", "flash_attention_2"],
    "optimizer": ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "paged_adamw_8bit", "adam"],
    "loss": ["full", "chunked", "liger"],
    "weight_dtype": ["fp32", "bf16", "fp16"],
    "adapter_dtype": ["fp32", "bf16"],
    "modules_to_save": ["lm_head", "embed_tokens,lm_head", "", "proj", "mlp", "nothing"],
}
number = st.integers(-2, 300).map(str) | st.sampled_from(["1e9", "nan", "0.5", "99999999999999999999", "", "many"])


@st.composite
def options(draw: st.DrawFn) -> list[str]:
    """Some options, each with a value that is likely, or a number, or neither."""
    arguments = []
    for name in draw(st.lists(st.sampled_from(sorted(RUN_OPTIONS)), max_size=7, unique=True)):
        arguments.append(f"--{name.replace('_', '-')}")
        if RUN_OPTIONS[name].__origin__ is not bool:
            arguments.append(draw(st.sampled_from(LIKELY[name]) if name in LIKELY else number))
    return arguments


@settings(max_examples=120, deadline=None)
@given(arguments=options())
def test_an_answer_or_a_clean_error(tiny: str, arguments: Sequence[str]) -> None:
    status, out, err = command("estimate", tiny, *arguments, "--json")
    if status == 0:
        document = json.loads(out)
        assert min(document["components"].values()) >= 0
        assert sum(document["components"].values()) == document["allocated_bytes"]
        assert document["allocated_bytes"] <= document["reserved_bytes"] <= document["process_bytes"]
        assert 0 <= document["num_trainable_params"] <= document["num_params"]
    else:
        assert status == 2, err
        assert out == ""
        says_what_is_wrong(err)


def says_what_is_wrong(err: str) -> None:
    first, *hints = err.splitlines()
    assert first.startswith("error: ")
    assert hints
    assert all(hint.startswith("hint: ") for hint in hints)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text(st.characters(exclude_characters="\x00", codec="utf-8"), max_size=12), max_size=4))
def test_any_words_at_all(words: list[str]) -> None:
    """No file of any name is asked for: the model is a word, so that paths are left out."""
    words = [word.replace("/", "").replace(".", "") for word in words]
    status, _, err = command(*words)
    assert status in (0, 2), err
    assert "Traceback" not in err


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=60)
    | st.dictionaries(
        st.sampled_from([*TINY, "head_dim", "rope_scaling", "quantization_config"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.lists(st.integers(), max_size=3),
    ).map(lambda changes: json.dumps({**TINY, **changes}).encode())
)
def test_any_config_file(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.json"
    path.write_bytes(content)
    status, out, err = command("estimate", str(path), "--seq-len", "64", "--json")
    assert status in (0, 2), err
    if status == 0:
        assert json.loads(out)["allocated_bytes"] > 0


ANY = (
    st.none()
    | st.booleans()
    | st.integers(-2, 130)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.lists(st.integers(0, 9), max_size=3)
)
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
           "topk_group": 1, "moe_intermediate_size": 32, "n_shared_experts": 1}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
BASES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    **{name: {**EXPERTS, **LATENT, "num_key_value_heads": 4} for name in ("deepseek_v2", "deepseek_v3")},
    "glm4_moe": {**EXPERTS, "head_dim": 16},
    "gemma3n_text": {
        "head_dim": 16,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.9, 0.0],
    },
    "gemma4_text": {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_kv_shared_layers": 1,
        "layer_types": ["full_attention"] * 2,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "full_attention_interval": 2,
    },
    "qwen3_next": {
        **EXPERTS,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "full_attention_interval": 2,
    },
    **{name: {**EXPERTS, "head_dim": 16} for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")},
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, object]:
    """A config that is right, of any family, with some keys that its class knows changed or gone."""
    model_type = draw(st.sampled_from(sorted(FAMILIES)))
    config: dict[str, object] = {**TINY, **BASES.get(model_type, {}), "model_type": model_type}
    for key in draw(st.lists(st.sampled_from([*config, *config_keys(model_type)]), max_size=3)):
        value = draw(ANY | st.just(...))
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    return config


@settings(max_examples=150, deadline=None)
@given(config=configs(), method=st.sampled_from(["full", "lora", "qlora"]), dora=st.booleans())
def test_any_config_of_any_family(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, object], method: str, dora: bool
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "family.json"
    path.write_text(json.dumps(config))
    more = ["--use-dora"] if dora and method != "full" else []
    status, out, err = command("estimate", str(path), "--method", method, *more, "--seq-len", "64", "--json")
    if status == 0:
        document = json.loads(out)
        assert min(document["components"].values()) >= 0
        assert sum(document["components"].values()) == document["allocated_bytes"]
    else:
        assert status == 2, err
        says_what_is_wrong(err)


def test_every_family_has_a_config_that_is_right(tmp_path: Path) -> None:
    for model_type in FAMILIES:
        path = tmp_path / f"{model_type}.json"
        path.write_text(json.dumps({**TINY, **BASES.get(model_type, {}), "model_type": model_type}))
        assert command("estimate", str(path), "--seq-len", "64", "--json")[0] == 0, model_type


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "gpt_neox", "hidden_size": 16},  # a quarter of a head of 4 is rotated
        {"head_dim": 1},
        {"model_type": "mixtral", "num_local_experts": 0},
        {"model_type": "gpt_oss", "num_local_experts": False, "head_dim": 16},
        {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": None},
    ],
)
def test_models_that_cannot_run_are_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY, **changed}))
    status, out, err = command("estimate", str(path), "--use-dora")
    assert (status, out) == (2, "")
    says_what_is_wrong(err)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device")
def test_a_file_without_an_end_is_not_read_to_its_end() -> None:
    status, _, err = command("estimate", "/dev/zero")
    assert status == 2
    assert "too large" in err
