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

from memplan.cli import app
from memplan.cli.options import RUN_OPTIONS

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
    "target_modules": ["all-linear", "q_proj,v_proj", "lm_head", "nothing"],
    "quant_type": ["nf4", "fp4", "int8"],
    "attention": ["eager", "sdpa", "flash_attention_2"],
    "optimizer": ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "paged_adamw_8bit", "adam"],
    "loss": ["full", "chunked", "liger"],
    "weight_dtype": ["fp32", "bf16", "fp16"],
    "adapter_dtype": ["fp32", "bf16"],
    "modules_to_save": ["lm_head", "embed_tokens,lm_head", ""],
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
        assert err.startswith("error: ")
        assert all(line.startswith("hint: ") for line in err.splitlines()[1:])


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
