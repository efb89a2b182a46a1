"""Seconds of a step: the host launches kernels, the device runs them, and the later of the two decides.

Launching is asynchronous, so within a piece of the step both run at once, and a device that lags behind lets the host
run ahead into the next piece: end = max(end + device, host's begin + max(host, device)), piece by piece. Layers have
many short kernels and wait for the host; the loss has few long ones, for which the host waits.

The host waits where it reads a result: Trainer looks whether each loss is a number (transformers 5.17 trainer.py,
`logging_nan_inf_filter`), SFTTrainer reads its metrics after each forward (TRL 1.16 trainer/sft_trainer.py
`compute_loss`), and LLM.int8 asks in every product whether there are outliers (bitsandbytes 0.50.2 backends/cuda/ops.py
`int8_vectorwise_quant`), so that its forward does not overlap at all. Nor do the products of routed experts where they
run as a loop over experts, which reads where each begins (torch 2.11 aten/src/ATen/native/GroupedMMUtils.h
`_grouped_mm_fallback`): everywhere but in bf16 on compute capability 9 and 10 (cuda/GroupedBlas.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.estimate import Estimate
from memplan.gpus import GpuSpec
from memplan.timing.flops import PIECES
from memplan.timing.profile import fit_for
from memplan.timing.roofline import Constants, Roofline, roofline
from memplan.timing.update import PASSES
from memplan.timing.work import StepWork, step_work
from memplan.train_config import TrainConfig

COMPUTE, BANDWIDTH, LAUNCHES = "compute", "memory bandwidth", "kernel launches"


@dataclass(frozen=True, slots=True)
class StepTime:
    """One optimizer step on one GPU."""

    step_seconds: float
    host_seconds: float
    """What launching takes."""
    device_seconds: dict[str, float]
    """What the kernels take, by part."""
    floor_seconds: float
    """No GPU of these peaks is faster: all arithmetic at the peak, all traffic at full bandwidth."""
    tokens: int
    model_flops: int
    peak_flops: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: FLOPs that the method needs, recomputation left out, per second and peak
        (Chowdhery et al. 2022, "PaLM", appendix B)."""
        return self.model_flops / (self.step_seconds * self.peak_flops)

    @property
    def bound_by(self) -> str:
        """What the step spends most of its time on."""
        if self.host_seconds > sum(self.device_seconds.values()):
            return LAUNCHES
        arithmetic = self.device_seconds["matrix products"] + self.device_seconds["attention"]
        return COMPUTE if arithmetic > sum(self.device_seconds.values()) / 2 else BANDWIDTH


def step_time(
    estimate: Estimate, gpu: GpuSpec, constants: Constants | None = None, *, num_micro_steps: int | None = None
) -> StepTime:
    """How long one optimizer step of `estimate`'s run takes on `gpu`.

    Raises:
        MemplanError: the GPU's peaks are not known, or it cannot multiply in the run's dtype.
    """
    work = step_work(estimate.program, estimate.model, estimate.config, num_micro_steps=num_micro_steps)
    return time_of(work, estimate.config, gpu, constants or fit_for(gpu).constants)


def time_of(work: StepWork, config: TrainConfig, gpu: GpuSpec, constants: Constants) -> StepTime:
    """The time of work that has been counted before: the same work on many GPUs costs one counting."""
    line = roofline(gpu, half_dtype(config), constants)
    micro, update = _device(work, line, config)
    loops = _loops(work, gpu)
    micro_host, update_host = _host(work, config, constants, loops)
    waits_within, waits_after = _waits(config, loops)
    begin = end = host = 0.0
    parts = dict.fromkeys(("matrix products", "attention", "elementwise", "dequantisation", "optimizer"), 0.0)
    for number in range(work.num_micro_steps):
        for piece in PIECES:
            device = sum(micro[piece].values())
            if piece in waits_within:
                begin = end = max(begin, end) + micro_host[piece] + device
            else:
                begin, end = _advance(begin, end, micro_host[piece], device)
            if piece in waits_after:
                begin = end
            host += micro_host[piece]
            for name, seconds in micro[piece].items():
                parts[name] += seconds
        if number:
            added = line.stream(work.accumulation_bytes)
            end += added
            parts["elementwise"] += added
    begin, end = _advance(begin, end, update_host, update)
    parts["optimizer"] += update
    return StepTime(
        step_seconds=end + constants.per_step,
        host_seconds=host + update_host + constants.per_step,
        device_seconds=parts,
        floor_seconds=_floor(work, line),
        tokens=work.tokens * work.num_micro_steps,
        model_flops=work.model_flops,
        peak_flops=line.half_flops,
    )


def _loops(work: StepWork, gpu: GpuSpec) -> dict[str, int]:
    """Products that loops over experts launch one by one, by phase."""
    fast = (gpu.compute_capability or "").split(".")[0] in ("9", "10")
    looped = [m for m in work.matmuls if m.part == "experts" and not (fast and m.dtype is DType.bf16)]
    return {
        phase: sum(m.count * m.groups for m in looped if (m.phase == "forward") is (phase == "forward"))
        for phase in ("forward", "backward")
    }


def _waits(config: TrainConfig, loops: dict[str, int]) -> tuple[frozenset[str], frozenset[str]]:
    """Pieces within which the host waits again and again, and those after which it waits once."""
    within = {phase for phase, number in loops.items() if number}
    if config.method == "qlora" and config.quant_type == "int8":
        within |= {"forward", "backward"} if config.gradient_checkpointing else {"forward"}
    after = {"torch": (), "trainer": ("backward",), "trl": ("loss", "backward")}[config.stack]
    return frozenset(within), frozenset(after)


def half_dtype(config: TrainConfig) -> DType:
    """The half precision in which most of the run multiplies (bf16 for one all in fp32, to have a peak to name)."""
    return DType.fp16 if config.weight_dtype == "fp16" and not config.autocast else DType.bf16


def _advance(begin: float, end: float, host: float, device: float) -> tuple[float, float]:
    return begin + host, max(end + device, begin + max(host, device))


def _device(work: StepWork, line: Roofline, config: TrainConfig) -> tuple[dict[str, dict[str, float]], float]:
    """Device seconds of one micro-step by piece and part, and of the update."""
    micro: dict[str, dict[str, float]] = {}
    kernel = line.constants.kernel
    passes = 3 if work.num_checkpoints else 2
    quantised = line.dequantise(work.dequantisation.read_bytes + work.dequantisation.written_bytes)
    for piece, count, share, tiles in (
        ("forward", work.forward, 1, 0),
        ("loss", work.loss, 0, work.tile_bytes[0]),
        ("loss_backward", work.loss_backward, 0, work.tile_bytes[1]),
        ("backward", work.backward, passes - 1, 0),
    ):
        micro[piece] = {
            "matrix products": sum(line.matmul(m) for m in work.matmuls if m.piece == piece),
            "attention": sum(line.attention(a) for a in work.attentions if a.piece == piece),
            "elementwise": line.elementwise(count.written_bytes) + line.stream(tiles) + count.kernels * kernel,
            "dequantisation": quantised * share / passes,
        }
    changed = line.update(work.update_bytes, blockwise=PASSES[config.optimizer].blockwise)
    return micro, changed + line.stream(work.clip_bytes) + work.update.kernels * kernel


def _host(work: StepWork, config: TrainConfig, c: Constants, loops: dict[str, int]) -> tuple[dict[str, float], float]:
    """Host seconds of one micro-step by piece, and of the update."""
    passes = 3 if work.num_checkpoints else 2
    python = work.dequantisation.calls * c.per_dequantisation / passes
    adapters = work.num_adapters * c.per_adapter
    forward = work.forward.kernels * c.launch_forward + python + adapters + loops["forward"] * c.per_group
    own = work.backward.kernels - work.recomputed.kernels
    backward = own * c.launch_backward + python * (passes - 1) + loops["backward"] * c.per_group
    if work.num_checkpoints:
        backward += work.recomputed.kernels * c.launch_recompute + work.num_checkpoints * c.per_checkpoint + adapters
    update = work.update.kernels * c.launch_update
    if PASSES[config.optimizer].loops:
        update += work.num_trained * c.per_parameter
    if config.stack != "torch":
        update += c.per_trainer_step
    pieces = {
        "forward": forward,
        "loss": work.loss.kernels * c.launch_forward,
        "loss_backward": work.loss_backward.kernels * c.launch_backward,
        "backward": backward,
    }
    return pieces, update


def _floor(work: StepWork, line: Roofline) -> float:
    arithmetic = sum(m.flops / (line.half_flops if m.dtype.is_half else line.fp32_flops) for m in work.matmuls)
    arithmetic += sum(a.flops / (line.half_flops if a.call.dtype.is_half else line.fp32_flops) for a in work.attentions)
    quantised = work.dequantisation.read_bytes + work.dequantisation.written_bytes
    written = sum(count.written_bytes for count in (work.forward, work.loss, work.loss_backward, work.backward))
    traffic = written + sum(work.tile_bytes) + quantised
    return (
        work.num_micro_steps * (arithmetic + traffic / line.bandwidth)
        + (work.clip_bytes + work.update_bytes) / line.bandwidth
    )
