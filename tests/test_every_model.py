"""Each bundled model can be asked for whatever its method, and memplan counts what transformers builds."""

from __future__ import annotations

import pytest

from memplan import catalog
from memplan.estimate import Estimate, estimate
from memplan.train_config import Method


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("name", catalog.names())
def test_every_model_has_an_estimate_for_every_method(name: str, method: Method) -> None:
    made = estimate(name, method=method)
    assert 0 < made.allocated_bytes <= made.reserved_bytes < made.process_bytes
    assert num_base_params(made) == made.model.num_parameters
    assert not any("parameters" in warning and "counted" in warning for warning in made.warnings)


def num_base_params(made: Estimate) -> int:
    return sum(w.numel for w in made.program.base_weights)
