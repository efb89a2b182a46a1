"""memplan: GPU memory, time and cost of fine-tuning a language model, from its architecture alone."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan import plot
    from memplan.cost import Cost, cost
    from memplan.errors import InvalidSpecError, MemplanError, UnknownNameError
    from memplan.estimate import Estimate, estimate
    from memplan.fit import FitReport, fit, solve
    from memplan.gpus import GpuSpec
    from memplan.model_spec import ModelSpec
    from memplan.plan import Plan, plan
    from memplan.train_config import TrainConfig
    from memplan.validation import Validation, validate

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "Estimate",
    "FitReport",
    "GpuSpec",
    "InvalidSpecError",
    "MemplanError",
    "ModelSpec",
    "Plan",
    "TrainConfig",
    "UnknownNameError",
    "Validation",
    "__version__",
    "cost",
    "estimate",
    "fit",
    "plan",
    "plot",
    "solve",
    "validate",
]

_HOMES = {
    "Cost": "cost",
    "Estimate": "estimate",
    "FitReport": "fit",
    "GpuSpec": "gpus",
    "InvalidSpecError": "errors",
    "MemplanError": "errors",
    "ModelSpec": "model_spec",
    "Plan": "plan",
    "TrainConfig": "train_config",
    "UnknownNameError": "errors",
    "Validation": "validation",
    "cost": "cost",
    "estimate": "estimate",
    "fit": "fit",
    "plan": "plan",
    "solve": "fit",
    "validate": "validation",
}


def __getattr__(name: str) -> Any:
    """A public name is imported when it is first used, so that a command starts with what it needs and no more."""
    if name == "plot":
        return import_module("memplan.plot")
    if name not in _HOMES:
        raise AttributeError(f"module `memplan` has no attribute `{name}`")
    value = globals()[name] = getattr(import_module(f"memplan.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Here `memplan.estimate` is the function, also once the module that it is in has been imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
