"""What a process takes beside its tensors: cuBLAS workspaces, the CUDA context, the kernels it loads.

`process` is what NVML reports as used on a card where nothing else runs: what the driver keeps for itself, the
context, kernels and libraries, and what the caching allocator reserved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memplan.gpus import GpuSpec
from memplan.profiles import find
from memplan.train_config import TrainConfig
from memplan.units import KIB, MIB


@dataclass(frozen=True, slots=True)
class Runtime:
    """Constants of one kind of GPU, each from a record or a cited source."""

    name: str
    driver_bytes: int
    """In use before any process starts (NVML's `reserved`)."""
    context_bytes: int
    """What creating the CUDA context adds."""
    kernels_bytes: int
    """Kernels and libraries that a few training steps load (lazily, CUDA_MODULE_LOADING)."""
    fused_attention_bytes: int
    """Added when a half-precision fused attention kernel is loaded."""
    int8_bytes: int
    """Added by bitsandbytes' int8 products."""
    workspace_bytes: int
    """One cuBLAS workspace; the main thread and the autograd thread have one each, counted as allocated."""
    basis: str
    """`measured`, `cited`, or `profile` for the user's own calibration."""
    source: str

    def beside_reserved(self, config: TrainConfig) -> int:
        """Process bytes that the allocator does not know of, for one run."""
        total = self.driver_bytes + self.context_bytes + self.kernels_bytes
        half = config.autocast or (config.weight_dtype != "fp32" and not (config.method == "qlora" and config.kbit_prep))
        if half and config.attention != "eager":
            total += self.fused_attention_bytes
        if config.method == "qlora" and config.quant_type == "int8":
            total += self.int8_bytes
        return total


# NVML before CUDA, after `torch.zeros(1, device="cuda")`, and at the end of three steps less reserved memory: the same
# in each of 164 runs, apart from the two additions (records of 2026-11-22, driver 580.159.04, torch 2.11.0+cu130).
H200 = Runtime(
    name="hopper",
    driver_bytes=644_939_776,
    context_bytes=650_969_088,
    kernels_bytes=1_432_223_744 - 644_939_776 - 650_969_088,
    fused_attention_bytes=16 * MIB,
    int8_bytes=64 * MIB,
    # aten/src/ATen/cuda/CublasHandlePool.cpp `parseChosenWorkspaceSize`: 32 MiB on compute capability 9
    workspace_bytes=32 * MIB,
    basis="measured",
    source="records of an NVIDIA H200, driver 580.159.04, torch 2.11.0+cu130",
)

# CublasHandlePool.cpp: `:4096:2:16:8` = 2 * 4096 KiB + 8 * 16 KiB elsewhere.
DEFAULT_WORKSPACE_BYTES = 2 * 4096 * KIB + 8 * 16 * KIB


def runtime_for(gpu: GpuSpec | None) -> Runtime:
    """The constants of `gpu`: from the user's own calibration if there is one; those of the H200 when none is named."""
    profile = find(gpu.products) if gpu is not None and gpu.products else None
    if profile is not None:
        return replace(
            _by_generation(gpu),
            driver_bytes=profile.driver_bytes,
            context_bytes=profile.context_bytes,
            kernels_bytes=profile.kernels_bytes,
            fused_attention_bytes=profile.fused_attention_bytes,
            basis="profile",
            source=f"your calibration of {profile.environment.get('date')}, {profile.num_runs} runs on {profile.product}",
        )
    return _by_generation(gpu)


def _by_generation(gpu: GpuSpec | None) -> Runtime:
    if gpu is None or gpu.generation in (None, "hopper"):
        return H200
    workspace = 32 * MIB if gpu.generation in ("hopper", "blackwell") else DEFAULT_WORKSPACE_BYTES
    return Runtime(
        name=gpu.generation,
        driver_bytes=H200.driver_bytes,
        context_bytes=H200.context_bytes,
        kernels_bytes=H200.kernels_bytes,
        fused_attention_bytes=H200.fused_attention_bytes,
        int8_bytes=H200.int8_bytes,
        workspace_bytes=workspace,
        basis="cited",
        source="context and kernels as on the H200, the largest that was measured; workspace by CublasHandlePool.cpp",
    )
