"""Warnings that any family gives."""

import pytest

from memplan import estimate


def test_a_sequence_beyond_the_positions_is_said() -> None:
    assert not estimate("llama-7b", seq_len=2048).warnings
    (warning,) = estimate("llama-7b", seq_len=2049).warnings
    assert "beyond the 2,048 positions" in warning


@pytest.mark.parametrize(("quant_type", "said"), [("int8", True), ("nf4", False)])
def test_int8_says_that_outliers_are_not_counted(quant_type: str, said: bool) -> None:
    warnings = estimate("llama-7b", method="qlora", quant_type=quant_type).warnings
    assert any("over 6.0" in warning for warning in warnings) is said
