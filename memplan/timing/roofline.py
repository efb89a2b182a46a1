"""Seconds of one op on one GPU: the slower of its arithmetic and its traffic, each at what the GPU reaches.

    matrix product   max(flops / (peak * efficiency(rows, cols, depth)), bytes / (bandwidth * stream)) + one kernel
    efficiency       matmul * f(rows) * f(cols) * f(depth), f(x) = x / (x + half size): small sides fill no tile
    attention        flops / (peak * efficiency * f(S))
    elementwise      written bytes * traffic / (bandwidth * stream): each written byte stands for what is read too
    a kernel         a floor of its own on the device, and a launch on the host

The constants are measured (`data/timing_h200.json`), the peaks those of the GPU's row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from memplan.dtypes import DType
from memplan.errors import MemplanError
from memplan.gpus import GpuSpec
from memplan.timing.flops import AttentionWork, Matmul


@dataclass(frozen=True, slots=True)
class Constants:
    """What steps measured on one GPU say; all above zero. Seconds are per call."""

    matmul: float = 0.8
    """Share of the half-precision peak that a large matrix product reaches (792 of 989 TFLOP/s at 8192 on an H200)."""
    matmul_fp32: float = 0.7
    """Share of the fp32 peak that a large fp32 product reaches."""
    half_size: float = 64.0
    """A side of a product at which its efficiency is halved."""
    flash: float = 0.5
    """Share of the peak that fused attention reaches at long sequences."""
    efficient: float = 0.2
    """The same of a kernel that takes a mask, and of the memory-efficient one."""
    attention_fp32: float = 0.5
    """The same of attention in fp32, of the fp32 peak."""
    half_tokens: float = 256.0
    """Sequence length at which attention's efficiency is halved."""
    stream: float = 0.9
    """Share of the bandwidth that a pass over large tensors reaches (a copy on an H200: 4.3 of 4.8 TB/s)."""
    traffic: float = 2.4
    """Bytes moved for each byte that an elementwise kernel writes."""
    dequantise: float = 0.5
    """Share of the bandwidth that 4-bit dequantisation reaches."""
    blockwise: float = 0.4
    """Share of the bandwidth that bitsandbytes' optimizers reach."""
    kernel: float = 2.5e-6
    """Floor of a kernel on the device."""
    launch_forward: float = 14e-6
    """Host, an op of forward: Python module, dispatch, graph node, launch."""
    launch_recompute: float = 18e-6
    """Host, an op of a recomputed forward, with the checkpoint's hooks."""
    launch_backward: float = 8e-6
    """Host, an op of backward."""
    launch_update: float = 6e-6
    """Host, an op of clipping and the optimizer."""
    per_parameter: float = 40e-6
    """Host, a parameter of an optimizer that goes through them one by one."""
    per_adapter: float = 60e-6
    """Host, an adapted layer's own Python, in each forward."""
    per_dequantisation: float = 60e-6
    """Host, a product with a 4-bit weight."""
    per_group: float = 15e-6
    """Host, one expert of a grouped product that runs as a loop."""
    per_checkpoint: float = 100e-6
    """Host, a checkpointed layer."""
    per_step: float = 2e-3
    """Host, a step: the loop itself."""
    per_trainer_step: float = 5e-3
    """Host, a step of Trainer or SFTTrainer beyond that."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Constants and what is known of them."""

    gpu: str
    constants: Constants
    source: str
    held_out: dict[str, float]
    """`median`, `p90` and `bias` of the relative error on rows that were not fitted, and their `rows`."""


@cache
def shipped() -> Fit:
    """The constants measured on an H200."""
    return read_fit(json.loads(files("memplan").joinpath("data/timing_h200.json").read_text(encoding="utf-8")))


def read_fit(body: dict[str, Any]) -> Fit:
    """A fit as `memplan.timing.fit` writes it."""
    return Fit(body["gpu"], Constants(**body["constants"]), body["source"], body["held_out"]["all"])


@dataclass(frozen=True, slots=True)
class Roofline:
    """One GPU's peaks under the measured constants."""

    constants: Constants
    half_flops: float
    """Peak of the half precision the run multiplies in, operations per second."""
    fp32_flops: float
    bandwidth: float
    """Bytes per second."""

    def matmul(self, m: Matmul) -> float:
        """Seconds of `m`, all its calls."""
        c, half = self.constants, self.constants.half_size
        rows = m.rows / m.groups
        shape = rows / (rows + half) * m.cols / (m.cols + half) * m.depth / (m.depth + half)
        rate = self.half_flops * c.matmul if m.dtype.is_half else self.fp32_flops * c.matmul_fp32
        return max(m.flops / (rate * shape), m.num_bytes / (self.bandwidth * c.stream))

    def attention(self, a: AttentionWork) -> float:
        """Seconds of `a`, all its layers."""
        c = self.constants
        is_half = a.call.dtype.is_half
        if a.call.kernel == "products":
            rate = self.half_flops * c.matmul if is_half else self.fp32_flops * c.matmul_fp32
            return a.flops / rate
        if not is_half:
            rate = self.fp32_flops * c.attention_fp32
        else:
            rate = self.half_flops * (c.efficient if a.call.masked or a.call.kernel == "efficient" else c.flash)
        return a.flops / rate * (a.seq_len + c.half_tokens) / a.seq_len

    def elementwise(self, written_bytes: int) -> float:
        return written_bytes * self.constants.traffic / (self.bandwidth * self.constants.stream)

    def stream(self, num_bytes: int) -> float:
        return num_bytes / (self.bandwidth * self.constants.stream)

    def update(self, num_bytes: int, *, blockwise: bool) -> float:
        return num_bytes / (self.bandwidth * (self.constants.blockwise if blockwise else self.constants.stream))

    def dequantise(self, num_bytes: int) -> float:
        return num_bytes / (self.bandwidth * self.constants.dequantise)


def roofline(gpu: GpuSpec, dtype: DType, constants: Constants) -> Roofline:
    """The roofline of `gpu` for a run that multiplies in `dtype`.

    Raises:
        MemplanError: a peak of this GPU is not known, or it has no such arithmetic.
    """
    half = gpu.fp16_flops if dtype is DType.fp16 else gpu.bf16_flops
    if gpu.bandwidth_bytes_per_s is None or gpu.fp32_flops is None or (half or gpu.fp16_flops) is None:
        raise MemplanError(
            f"the peaks of `{gpu.name}` are not known, so neither is the time",
            hints=["name a GPU with known peaks, such as `rtx-4090`"],
        )
    if half is None:
        raise MemplanError(
            f"`{gpu.name}` has no {dtype.name} arithmetic", hints=["choose a GPU of compute capability 8.0 or above"]
        )
    return Roofline(constants, half, gpu.fp32_flops, gpu.bandwidth_bytes_per_s)
