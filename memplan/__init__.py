"""memplan: GPU memory, time and cost of fine-tuning a language model, from its architecture alone."""

from memplan.cost import Cost, cost
from memplan.errors import InvalidSpecError, MemplanError, UnknownNameError
from memplan.estimate import Estimate, estimate
from memplan.gpus import GpuSpec
from memplan.model_spec import ModelSpec
from memplan.plan import Plan, plan
from memplan.train_config import TrainConfig

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "Estimate",
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
    "plan",
]
