"""Imports torch, transformers, PEFT and bitsandbytes without opening CUDA, so that the process may fork."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import Any

from memplan.calibration.record import Case
from memplan.errors import MemplanError


def preload(cases: Iterable[Case]) -> str | None:
    """Import what the cases need. None if the process may fork, else the module whose import opened CUDA.

    Raises:
        MemplanError: a library that measuring needs is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # is_available() then asks NVML instead of opening a context.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        import torch
    except ImportError as error:
        raise _not_installed(error) from error

    with _capability_from_nvml(torch):
        for name in ("bitsandbytes", "transformers", "peft", "transformers.trainer"):
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise _not_installed(error) from error
            if torch.cuda.is_initialized():
                return name
        from transformers import AutoConfig, AutoModelForCausalLM

        stacks: set[str] = set()
        model_types: set[str] = set()
        for case in cases:
            stacks.add(case.train_config().stack)
            model_types.add(str(case.hf_config["model_type"]))
        for model_type in sorted(model_types):
            with contextlib.suppress(ValueError, KeyError):  # the case itself will say what is wrong
                AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(model_type))]
        for name in _own_modules(stacks):
            importlib.import_module(name)
            if torch.cuda.is_initialized():
                return name
    return None


def _not_installed(error: ImportError) -> MemplanError:
    return MemplanError(
        f"measuring needs a library that is not installed: {error}", hints=["pip install 'memplan[gpu]'"]
    )


def _own_modules(stacks: set[str]) -> Iterator[str]:
    yield "memplan.calibration.run"
    yield "memplan.calibration.adapters"
    if stacks & {"trainer", "trl"}:
        yield "memplan.calibration.trainers"
    if "trl" in stacks and importlib.util.find_spec("trl") is not None:
        yield "trl"


@contextlib.contextmanager
def _capability_from_nvml(torch: Any) -> Iterator[None]:
    """bitsandbytes asks for the compute capability on import, which opens CUDA; NVML knows it too."""
    usual = torch.cuda.get_device_capability

    def ask(device: Any = None) -> tuple[int, int]:
        import pynvml

        pynvml.nvmlInit()
        try:
            index = device if isinstance(device, int) else int(getattr(device, "idx", 0) or 0)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(index))
        finally:
            pynvml.nvmlShutdown()
        return int(major), int(minor)

    torch.cuda.get_device_capability = ask
    try:
        yield
    finally:
        torch.cuda.get_device_capability = usual
