"""What pydantic finds wrong with a run, in memplan's words: what is legal, the nearest name, what happens unsaid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from memplan.errors import MemplanError, UnknownNameError, shortened
from memplan.train_config import PRESETS, TrainConfig

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def complaint(error: ValidationError) -> MemplanError:
    """The first thing that is wrong with the fields of a TrainConfig."""
    first = error.errors(include_url=False)[0]
    context: Mapping[str, Any] = first.get("ctx", {})
    name = str(first["loc"][0]) if first["loc"] else ""
    cause = context.get("error")
    if isinstance(cause, MemplanError):
        return MemplanError(f"`{name}`: {cause.message}" if name else cause.message, hints=cause.hints)
    field = TrainConfig.model_fields.get(name)
    if field is None:
        return UnknownNameError("setting", shortened(name), TrainConfig.model_fields)
    said = shortened(str(first["input"]))
    if first["type"] == "literal_error" and len(first["loc"]) == 1:
        return UnknownNameError(name, said, get_args(field.annotation))
    bounds = [(words, getattr(part, key, None)) for part in field.metadata for key, words in _BOUNDS.items()]
    legal = " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
    reason = first["msg"][:1].lower() + first["msg"][1:]
    unsaid = "the stack decides" if name in PRESETS["trl"] else f"it is {_default(name)}"
    return MemplanError(
        f"`{name}` must be {legal}, not `{said}`" if legal else f"`{name}` cannot be `{said}`: {reason}",
        hints=[f"left out, {unsaid}"],
    )


def _default(name: str) -> object:
    value = getattr(TrainConfig(), name)
    return "empty" if value == () else str(value).lower() if isinstance(value, bool) else value
