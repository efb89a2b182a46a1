"""How far measured runs have gone beyond their predictions: the band inside which `fit` does not say yes.

The shares come from the shipped records (`memplan validate`), by stack: the worst prediction of process memory that was
too low, and never from taste. A test recomputes them from the records.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources

from memplan.train_config import TrainConfig


@cache
def worst_low_shares() -> dict[str, float]:
    """By stack, the largest share by which a measured run took more reserved memory than predicted."""
    text = resources.files("memplan").joinpath("data/residuals.json").read_text(encoding="utf-8")
    return {stack: float(share) for stack, share in json.loads(text)["worst_low_share"].items()}


def band(config: TrainConfig, num_bytes: int) -> int:
    """Bytes that a run like `config` of about `num_bytes` may take beyond its prediction."""
    shares = worst_low_shares()
    return int(num_bytes * shares.get(config.stack, max(shares.values())))
