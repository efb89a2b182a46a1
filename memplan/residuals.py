"""How far measured runs have gone beyond their predictions: the band inside which `fit` does not say yes.

`data/residuals.json` is written by `python -m memplan.excess` from the shipped records, and only ever
widened: corrections are led to by those same runs, and a band narrowed after each would know only what is explained.
Small runs exceed by whole segments of the allocator (2 to 20 MiB), larger ones by a share of what they take.
An int8 base has a band of its own: how many columns it keeps whole depends on the data, and no two layers keep as many.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from memplan.train_config import TrainConfig
from memplan.units import MIB

LARGE_RUN_BYTES = 2048 * MIB
"""From here on the excess is a share: a segment is then less than 1 % of a run."""
KINDS = ("int8", "other")


@dataclass(frozen=True, slots=True)
class Band:
    """The most by which measured runs of one kind exceeded their predictions."""

    share_of_large_runs: float
    bytes_of_small_runs: int


def kind(config: TrainConfig) -> str:
    """Which band a run falls in; between stacks, methods and other bases the records show no difference to rely on."""
    return "int8" if config.method == "qlora" and config.quant_type == "int8" else "other"


@cache
def bands() -> dict[str, Band]:
    """By kind of run."""
    text = resources.files("memplan").joinpath("data/residuals.json").read_text(encoding="utf-8")
    return {name: Band(**found) for name, found in json.loads(text).items()}


def band(config: TrainConfig, tensor_bytes: int) -> int:
    """Bytes that a run of `tensor_bytes` may take beyond its prediction."""
    found = bands()[kind(config)]
    return max(int(tensor_bytes * found.share_of_large_runs), found.bytes_of_small_runs)


def measured_band(excesses: Iterable[tuple[int, int]]) -> Band:
    """The band of measured runs of one kind, from (tensor_bytes, excess bytes) of each."""
    share, small = 0.0, 0
    for tensor_bytes, excess in excesses:
        if tensor_bytes < LARGE_RUN_BYTES:
            small = max(small, excess)
        else:
            share = max(share, excess / tensor_bytes)
    # upwards: a band a hair too narrow would be one that a measured run exceeds
    return Band(int(share * 10_000 + 1) / 10_000, small)
