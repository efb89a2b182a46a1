"""What a process takes beside its tensors: cuBLAS workspaces, the CUDA context, the kernels it loads.

`process` is what NVML reports as used on a card where nothing else runs: what the driver keeps for itself, the
context, kernels and libraries, and what the caching allocator reserved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from memplan.gpus import GpuSpec
from memplan.ops.device import HOPPER, Device
from memplan.train_config import TrainConfig
from memplan.units import GIB, KIB, MIB


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

    def beside_reserved(self, config: TrainConfig, managed_bytes: int = 0) -> int:
        """Process bytes that the allocator does not know of, for one run; `managed_bytes` of it by paged optimizers."""
        total = self.driver_bytes + self.context_bytes + self.kernels_bytes
        total += -(-managed_bytes // MANAGED_PIECE_BYTES) * MANAGED_PIECE_BYTES
        prepared = config.method == "qlora" and config.kbit_prep  # its residual stream is fp32
        half = config.autocast or (config.weight_dtype != "fp32" and not prepared)
        if half and config.attention != "eager":
            total += self.fused_attention_bytes
        if config.method == "qlora" and config.quant_type == "int8":
            total += self.int8_bytes
        return total


# What NVML counts for managed memory in use: 128 MiB for 6.75 and for 72 MiB of paged states, 640 MiB for about 600 MiB
# (runs d1-022, d1-021 and d1-020 of the H200 records).
MANAGED_PIECE_BYTES = 128 * MIB

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

# On the H100 all but the driver's own is the same to the byte, in 22 runs of `memplan calibrate --quick`.
H100 = replace(
    H200,
    driver_bytes=480 * MIB,
    source="records of an NVIDIA H100 80GB HBM3, driver 580.159.04, torch 2.11.0+cu130",
)
MEASURED = {"h200": H200, "h100-sxm": H100}

# CublasHandlePool.cpp: `:4096:2:16:8` = 2 * 4096 KiB + 8 * 16 KiB on all but Hopper and data-centre Blackwell.
DEFAULT_WORKSPACE_BYTES = 2 * 4096 * KIB + 8 * 16 * KIB
_LARGE_WORKSPACE = ("9.0", "10.0", "10.3", "12.0")
# aten/src/ATen/native/transformers/cuda/sdp_utils.cpp `check_prefer_cudnn_attention` (torch 2.11, cuDNN 9.15 and later)
_CUDNN_ATTENTION = ("9.0", "10.0", "10.3")

# What CUDA has of a card (as its out-of-memory message says) against what nvidia-smi calls its total: the driver's own.
DRIVER_BYTES: dict[str, tuple[int, str]] = {
    "t4": (15360 * MIB - int(14.56 * GIB), "14.56 GiB of 15360 MiB: Zheng-Chong/CatVTON issue 133"),
    "rtx-4090": (24564 * MIB - int(23.61 * GIB), "23.61 GiB of 24564 MiB: pinokiofactory/flux-webui issue 11"),
    "rtx-5090": (32607 * MIB - int(31.37 * GIB), "31.37 GiB of 32607 MiB: Wan-Video/Wan2.1 issue 465"),
    "a100-40gb": (40960 * MIB - int(39.50 * GIB), "39.50 GiB of 40960 MiB: TianheWu/CoSeR issue 10"),
    "a100-80gb": (81920 * MIB - int(79.25 * GIB), "79.25 GiB of 81920 MiB: wbfwonderful/Vad-R1 issue 11"),
    "rtx-6000-ada": (49140 * MIB - 50_865_307_648, "50865307648 B of 49140 MiB: unslothai/unsloth-zoo pull 1053"),
}
# Where nothing is cited: the largest share that a card above keeps (a T4's), but no more than any of them keeps.
_LARGEST_DRIVER_SHARE = DRIVER_BYTES["t4"][0] / (15360 * MIB)
_LARGEST_DRIVER_BYTES = max(kept for kept, _ in DRIVER_BYTES.values())

CONTEXT_BYTES: dict[str, tuple[int, str]] = {
    "turing": (147 * MIB, "133 to 147 MiB on a T4: README of fitcheck-llm 0.3.1"),
    "ampere": (501 * MIB, "501 MiB on an A100: documentation of AgileRL"),
    "ada": (426 * MIB, "426 MiB on an RTX 6000 Ada, torch 2.10+cu130: unslothai/unsloth-zoo pull 1053"),
}
"""What creating the CUDA context adds, by generation; others take the H200's, the largest known."""


def device_for(gpu: GpuSpec | None) -> Device:
    """What of `gpu` decides how kernels use memory; that of the H200 when none is named.

    Multiprocessors are taken as 132 on all cards: they only bound the buffers of split reductions.
    """
    if gpu is None or gpu.generation is None:
        return HOPPER
    return Device(gpu.generation, prefers_cudnn_attention=gpu.compute_capability in _CUDNN_ATTENTION)


def runtime_for(gpu: GpuSpec | None) -> Runtime:
    """The constants of `gpu`: from the user's own calibration if there is one; those of the H200 when none is named."""
    if gpu is None or not gpu.products:
        return _from_tables(gpu)
    from memplan.profiles import find

    profile = find(gpu.products)
    if profile is None:
        return _from_tables(gpu)
    return replace(
        _from_tables(gpu),
        driver_bytes=profile.driver_bytes,
        context_bytes=profile.context_bytes,
        kernels_bytes=profile.kernels_bytes,
        fused_attention_bytes=profile.fused_attention_bytes,
        basis="profile",
        source=f"your calibration of {profile.environment.get('date')}, {profile.num_runs} runs on {profile.product}",
    )


def _from_tables(gpu: GpuSpec | None) -> Runtime:
    if gpu is None or gpu.generation is None:
        return H200
    if gpu.name in MEASURED:
        return MEASURED[gpu.name]
    context, context_source = CONTEXT_BYTES.get(
        gpu.generation, (H200.context_bytes, "as on the H200, the largest known")
    )
    driver, driver_source = DRIVER_BYTES.get(
        gpu.name,
        (H200.driver_bytes, "as on the H200")
        if gpu.generation == "hopper"
        else (
            min(int(gpu.memory_bytes * _LARGEST_DRIVER_SHARE), _LARGEST_DRIVER_BYTES),
            "the most that a card known keeps",
        ),
    )
    return replace(
        H200,
        name=gpu.generation,
        driver_bytes=driver,
        context_bytes=context,
        workspace_bytes=32 * MIB if gpu.compute_capability in _LARGE_WORKSPACE else DEFAULT_WORKSPACE_BYTES,
        basis="cited",
        source=f"driver: {driver_source}; context: {context_source}; kernels as on the H200",
    )
