"""The same run over many values of a knob or two: the data behind `memplan plot`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from os import PathLike
from typing import Any

from memplan import catalog, gpus
from memplan.errors import MemplanError, UnknownNameError
from memplan.estimate import Estimate, ModelLike, make_config
from memplan.gpus import GpuSpec
from memplan.model_spec import ModelSpec
from memplan.train_config import NO_USE_FOR, TrainConfig

NUMERIC = ("rank", "seq_len", "micro_batch_size", "gradient_accumulation_steps", "lora_dropout")
NAMED = ("method", "model", "attention", "optimizer", "loss", "weight_dtype", "stack", "quant_type")
KNOBS = (*NUMERIC, *NAMED)
MAX_POINTS = 2000

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Point:
    """One value of each knob and what the run then takes."""

    values: tuple[Value, ...]
    estimate: Estimate


@dataclass(frozen=True)
class Sweep:
    """Estimates over the product of the knobs' values, the last knob fastest."""

    knobs: tuple[str, ...]
    values: tuple[tuple[Value, ...], ...]
    points: tuple[Point, ...]

    def along(self, knob: str, **fixed: Value) -> Iterator[Point]:
        """The points in which the other knobs have the values `fixed`, in the order of `knob`'s values."""
        assert knob in self.knobs
        for point in self.points:
            named = dict(zip(self.knobs, point.values, strict=True))
            if all(named[name] == value for name, value in fixed.items()):
                yield point


def parse_over(text: str) -> tuple[str, tuple[Value, ...]]:
    """`rank=4,8,16` as a knob and its values; also `rank=4:256:x2` (doubling) and `seq_len=512:4096:512` (by steps).

    Raises:
        MemplanError: not of that form, an unknown knob, or values that are no numbers where numbers are asked for.
    """
    knob, equals, listed = text.partition("=")
    knob = knob.strip().replace("-", "_")
    if not equals or not listed.strip():
        raise MemplanError(f"`{text}` is not KNOB=VALUES", hints=["write it like `rank=4,8,16` or `rank=4:256:x2`"])
    if knob not in KNOBS:
        raise UnknownNameError("knob", knob, KNOBS)
    values: tuple[Value, ...]
    if ":" in listed and knob in NUMERIC:
        values = tuple(_range(listed, text))
    else:
        values = tuple(_value(knob, part.strip(), text) for part in listed.split(",") if part.strip())
    if not values:
        raise MemplanError(f"`{text}` has no values")
    return knob, tuple(dict.fromkeys(values))


def _value(knob: str, part: str, text: str) -> Value:
    if knob not in NUMERIC:
        return part
    try:
        return float(part) if knob == "lora_dropout" else int(part)
    except ValueError:
        raise MemplanError(f"`{part}` in `{text}` is no number") from None


def _range(listed: str, text: str) -> Iterator[int]:
    try:
        first, last, step = listed.split(":")
        low, high = int(first), int(last)
        by, times = (0, int(step[1:])) if step.startswith("x") else (int(step), 1)
    except ValueError:
        raise MemplanError(
            f"`{text}` is no range", hints=["write FIRST:LAST:STEP, or FIRST:LAST:x2 to double"]
        ) from None
    if low < 1 or high < low or (by < 1 and times < 2):
        raise MemplanError(f"`{text}` does not go from a small number up")
    made = 0
    while low <= high:
        yield low
        low = low * times + by
        made += 1
        if made > MAX_POINTS:
            raise MemplanError(f"`{text}` has more than {MAX_POINTS} values")


def sweep(
    model: ModelLike,
    over: Mapping[str, Sequence[Value]],
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    gpu: GpuSpec | str | None = None,
    **fields: Any,
) -> Sweep:
    """Estimates of `model` over every combination of the values in `over`.

    Args:
        over: knob -> values: fields of TrainConfig, or `model`. Over methods, a field that one of them has no use for
            applies to the others.
        config, gpu, fields: as `estimate`.

    Raises:
        MemplanError: as `estimate`, an unknown knob or one without values, or more than MAX_POINTS combinations.
    """
    knobs = tuple(over)
    for knob in knobs:
        if knob not in KNOBS:
            raise UnknownNameError("knob", knob, KNOBS)
        if not over[knob]:
            raise MemplanError(f"`{knob}` has no values")
    values = tuple(tuple(over[knob]) for knob in knobs)
    combinations = list(product(*values))
    if len(combinations) > MAX_POINTS:
        raise MemplanError(f"{len(combinations)} combinations are more than {MAX_POINTS}")
    base = {**(_said(config)), **fields}
    card = gpus.get(gpu) if isinstance(gpu, str) else gpu
    models: dict[object, tuple[ModelSpec, dict[str, Any]]] = {}
    points = []
    for combination in combinations:
        changed = dict(zip(knobs, combination, strict=True))
        name = changed.pop("model", model)
        if name not in models:
            models[name] = catalog.load_with_settings(name if isinstance(name, ModelSpec | PathLike) else str(name))
        spec, decided = models[name]
        run = {**base, **changed}
        if "method" in knobs:  # what is said once is for the methods that have a use for it
            unused = NO_USE_FOR.get(str(run["method"]), ())
            run = {name: value for name, value in run.items() if name not in unused}
        points.append(Point(combination, Estimate(spec, make_config(run, decided=decided), card)))
    return Sweep(knobs, values, tuple(points))


def _said(config: TrainConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(config, TrainConfig):
        return {name: getattr(config, name) for name in config.model_fields_set}
    return dict(config or {})
