"""memplan's played step against the real transformers + PEFT + bitsandbytes + TRL step on fake tensors, no GPU.

Every figure of both steps (bytes alive at the end of each phase, and its peak) within 0.1 %.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("trl")

from tests.ledger.compare import figures
from tests.ledger.design import Combination, combinations

pytestmark = pytest.mark.oracle

TOLERANCE = 0.001


@pytest.mark.parametrize("combination", combinations(), ids=lambda combination: combination.id)
def test_every_phase_is_the_real_one(combination: Combination) -> None:
    found = figures(combination.hf_config, combination.config)
    off = [figure for figure in found if abs(figure.error) > TOLERANCE]
    assert not off, "\n".join(["", *map(str, off)])
