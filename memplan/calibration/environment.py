"""The first line of a measurement file: which GPU, driver and library versions."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata

from memplan.calibration.record import Environment

_LIBRARIES = (
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "trl",
    "liger_kernel",
    "flash_attn",
    "memplan",
)


def read_environment(device: str = "cuda") -> Environment:
    """Asked of NVML and of the packages' metadata; opens no CUDA context."""
    import torch

    facts: dict[str, str | int | None] = {"gpu": device, "gpu_total_bytes": 0}
    if device != "cpu":
        from memplan.calibration.meter import Driver

        driver = Driver()
        reading = driver.read()
        facts = {
            "gpu": driver.name(), "gpu_total_bytes": reading.total_bytes,
            "gpu_reserved_bytes": reading.reserved_bytes, "driver": driver.version(),
        }  # fmt: skip
        driver.close()  # a process that forks had better leave NVML shut
    facts["cuda"] = torch.version.cuda
    facts["torch"] = torch.__version__
    facts["python"] = platform.python_version()
    facts["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    facts["allocator_conf"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    for name in _LIBRARIES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    return Environment.model_validate(facts)
