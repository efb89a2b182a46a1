"""How far measured runs have gone beyond their predictions: the band inside which `fit` does not say yes.

`data/residuals.json` is what `measured_excess` found over the shipped records before the last corrections, which those
same runs led to: narrowed after each, the band would know only runs already explained. A test holds it against them.
Small runs exceed by whole segments of the allocator (2 to 20 MiB), larger ones by a share of what they take.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

from memplan.estimate import Estimate
from memplan.memory.allocator import OutOfMemory
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.simulate import simulate
from memplan.units import MIB

LARGE_RUN_BYTES = 2048 * MIB
"""From here on the excess is a share: a segment is then less than 1 % of a run."""


@cache
def _measured() -> dict[str, Any]:
    text = resources.files("memplan").joinpath("data/residuals.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def band(num_bytes: int) -> int:
    """Bytes that a run of about `num_bytes` of tensors may take beyond its prediction."""
    measured = _measured()
    share = measured["share_of_large_runs"]
    return max(int(num_bytes * share), int(measured["bytes_of_small_runs"]))


def excess_bytes(made: Estimate, allocated_bytes: int, reserved_bytes: int | None) -> int:
    """What a run took beyond its prediction, in either tier; `reserved_bytes` None where a limit held it down."""
    reserved = 0 if reserved_bytes is None else reserved_bytes - made.reserved_bytes
    return max(0, allocated_bytes - made.allocated_bytes, reserved)


def excess_at_limit(made: Estimate, limit_bytes: int) -> int:
    """For a run that ran out of memory under `limit_bytes`: how much less it would have to be for memplan to say so.

    0 where it says so already; found to a thousandth of the limit.
    """
    for part in range(1000):
        margin = limit_bytes * part // 1000
        try:
            simulate(made.program, replace(AllocatorConfig(), limit_bytes=limit_bytes - margin))
        except OutOfMemory:
            return margin
    return limit_bytes


def measured_excess(excesses: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """What `data/residuals.json` holds, from (tensor_bytes, excess bytes) of measured runs.

    One band for all: between stacks, methods and bases the records show no difference to rely on.
    """
    share, small = 0.0, 0
    for tensor_bytes, excess in excesses:
        if tensor_bytes < LARGE_RUN_BYTES:
            small = max(small, excess)
        else:
            share = max(share, excess / tensor_bytes)
    # upwards: a band a hair too narrow would be one that a measured run exceeds
    return {"share_of_large_runs": int(share * 10_000 + 1) / 10_000, "bytes_of_small_runs": small}
