"""Warnings that any family gives, and runs that it refuses."""

import pytest

from memplan import MemplanError, estimate
from memplan.architectures import FAMILIES
from memplan.architectures.run_checks import WITHOUT_FLASH


def test_a_sequence_beyond_the_positions_is_said() -> None:
    assert not estimate("llama-7b", seq_len=2048).warnings
    (warning,) = estimate("llama-7b", seq_len=2049).warnings
    assert "beyond the 2,048 positions" in warning


@pytest.mark.parametrize(("quant_type", "said"), [("int8", True), ("nf4", False)])
def test_int8_says_that_outliers_are_those_of_fresh_weights(quant_type: str, said: bool) -> None:
    warnings = estimate("llama-7b", method="qlora", quant_type=quant_type).warnings
    assert any("as for fresh weights" in warning for warning in warnings) is said


def test_a_loss_that_liger_does_not_replace_is_said() -> None:
    said = {model: estimate(model, stack="trainer", loss="liger").warnings for model in ("smollm2-135m", "gpt2")}
    assert said["smollm2-135m"] == ()
    assert "no fused loss for `gpt2`" in said["gpt2"][0]
    with pytest.raises(MemplanError, match="refuses it"):
        estimate("granite-3.1-2b", stack="trainer", loss="liger")


def test_flash_attn_says_that_it_was_not_measured() -> None:
    assert "were not measured" in estimate("smollm2-135m", attention="flash_attention_2").warnings[0]
    for refused in ({"weight_dtype": "fp32", "autocast": False}, {"model": "gptj-6b"}, {"model": "mpt-7b"}):
        fields = {"model": "smollm2-135m", "attention": "flash_attention_2", **refused}
        with pytest.raises(MemplanError, match="flash attention"):
            estimate(**fields)


def test_sdpa_that_the_family_lacks_is_played_as_eager() -> None:
    for asked in ({}, {"attention": "sdpa"}):
        assert "eager runs in its place" in estimate("bloom-560m", **asked).warnings[0]


@pytest.mark.parametrize(("stack", "loss"), [("trl", "full"), ("trl", "liger"), ("trainer", "chunked")])
def test_a_loss_that_the_stack_does_not_compute_is_said(stack: str, loss: str) -> None:
    made = estimate("smollm2-135m", stack=stack, loss=loss, seq_len=256)
    assert made.allocated_bytes > 0
    (warning,) = made.warnings
    assert f"`{loss}` is estimated as asked" in warning


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", FAMILIES)
def test_attentions_are_those_of_the_classes(model_type: str) -> None:
    pytest.importorskip("torch")
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    assert FAMILIES[model_type].supports_sdpa is cls._supports_sdpa
    assert (model_type not in WITHOUT_FLASH) is cls._supports_flash_attn
