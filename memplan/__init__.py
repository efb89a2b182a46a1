"""memplan: GPU memory, time and cost of fine-tuning a language model, from its architecture alone."""

from importlib import import_module
from types import ModuleType

from memplan.cost import Cost, cost
from memplan.errors import InvalidSpecError, MemplanError, UnknownNameError
from memplan.estimate import Estimate, estimate
from memplan.fit import FitReport, fit, solve
from memplan.gpus import GpuSpec
from memplan.model_spec import ModelSpec
from memplan.plan import Plan, plan
from memplan.train_config import TrainConfig

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
    "__version__",
    "cost",
    "estimate",
    "fit",
    "plan",
    "plot",
    "solve",
]


def __getattr__(name: str) -> ModuleType:
    """`memplan.plot` is imported when it is first used: it needs matplotlib, estimates do not."""
    if name == "plot":
        return import_module("memplan.plot")
    raise AttributeError(f"module `memplan` has no attribute `{name}`")
