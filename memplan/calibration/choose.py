"""Which runs `memplan calibrate` makes on a card: those that memplan says will fit."""

from __future__ import annotations

import hashlib
import json
import re
from importlib import resources
from typing import Any

from memplan import catalog
from memplan.calibration.design import draw
from memplan.calibration.record import Case, read_cases
from memplan.errors import MemplanError
from memplan.estimate import Estimate, make_config
from memplan.gpus import DetectedGpu
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

NUM_DEFAULT, NUM_FULL = 60, 150


def cases_for(
    card: DetectedGpu,
    model: str | None,
    run: dict[str, Any],
    *,
    quick: bool,
    full: bool,
    seed: int,
    share: float,
) -> list[Case]:
    """The user's own run, the quick set, or a drawn one.

    Raises:
        MemplanError: an unknown model, a run that is none, or nothing that fits.
    """
    if model is not None:
        config = make_config(run)
        said = {name: getattr(config, name) for name in sorted(config.model_fields_set)}
        return [Case(id=_id(model, said, config.method), hf_config=catalog.source_config(model), config=said)]
    limit = int(card.total_bytes * share)
    stacks = ("torch", "trainer", "trl") if _has_trl() else ("torch", "trainer")

    def bytes_of(hf_config: dict[str, Any], config: TrainConfig) -> int:
        return Estimate(ModelSpec.from_hf_config(hf_config), config, card.spec).process_bytes

    if quick:
        path = resources.files("memplan.calibration").joinpath("designs/quick.json")
        with resources.as_file(path) as file:
            cases = [c for c in read_cases(file) if c.train_config().stack in stacks]
        cases = [c for c in cases if bytes_of(c.hf_config, c.train_config()) <= limit]
    else:
        cases = draw(seed, NUM_FULL if full else NUM_DEFAULT, max_bytes=limit, stacks=stacks, bytes_of=bytes_of)
    if not cases:
        raise MemplanError("nothing that memplan could measure fits on this GPU")
    return cases


def _id(model: str, said: dict[str, Any], method: str) -> str:
    """Names a run: readable, of the letters that an id may have, and another one for any other model or options."""
    text = json.dumps([model, said], sort_keys=True, default=str)
    words = [model.rstrip("/").rpartition("/")[2], method, *(f"{k}_{v}" for k, v in said.items() if k != "method")]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))
    return f"{readable[:100].strip('-_')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _has_trl() -> bool:
    from importlib.util import find_spec

    return find_spec("trl") is not None
