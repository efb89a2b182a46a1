"""Reads the caching allocator, phase by phase, and the driver's figures for the whole card.

On a device that is not CUDA every figure is 0: the same code then runs where there is no GPU, to be tested.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch

from memplan.calibration.record import DeviceReading, PhaseFigures
from memplan.errors import MemplanError


@dataclass
class Mark:
    """A phase began, after so many allocations and frees of this process (0 while nobody counts)."""

    step: int
    micro_step: int
    phase: str
    num_allocs: int
    num_frees: int


@dataclass
class Meter:
    """Figures per phase. `begin` ends the phase before it, so that phases are seamless."""

    device: torch.device
    rows: list[PhaseFigures] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    current: Mark | None = None
    counts: bool = False
    """Count allocations at each mark: it is how a trace is cut into phases, and costs a fraction of a ms."""

    def begin(self, phase: str, step: int = 0, micro_step: int = 0) -> None:
        self.end()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.current = Mark(step, micro_step, phase, *(self.count() if self.counts else (0, 0)))
        self.marks.append(self.current)

    def count(self) -> tuple[int, int]:
        """Allocations and frees of this process so far."""
        stats = torch.cuda.memory_stats(self.device)
        return stats.get("allocation.all.allocated", 0), stats.get("allocation.all.freed", 0)

    def end(self) -> None:
        """Close the open phase, if there is one, and read what it took."""
        if self.current is None:
            return
        open_, self.current = self.current, None
        allocated, peak, reserved, peak_reserved = allocator_figures(self.device)
        self.rows.append(
            PhaseFigures(
                step=open_.step, micro_step=open_.micro_step, phase=open_.phase, allocated_bytes=allocated,
                peak_allocated_bytes=peak, reserved_bytes=reserved, peak_reserved_bytes=peak_reserved,
            )
        )  # fmt: skip

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def allocator_figures(device: torch.device) -> tuple[int, int, int, int]:
    """Bytes allocated, peak allocated, reserved, peak reserved since the last reset."""
    if device.type != "cuda":
        return 0, 0, 0, 0
    return (
        torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device),
        torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device),
    )  # fmt: skip


class Driver:
    """NVML's view of every card; which of them is ours is known once CUDA is up (`choose`).

    Raises:
        MemplanError: there is no NVIDIA driver to ask.
    """

    def __init__(self) -> None:
        import pynvml

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            hints = ["measuring needs a machine with an NVIDIA GPU; estimating needs none"]
            raise MemplanError(f"no NVIDIA driver answers: {error}", hints=hints) from error
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        self._ours = 0

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def choose(self, uuid: str) -> None:
        """Select the card with this UUID (as torch's device properties give it, without `GPU-`)."""
        for number, handle in enumerate(self._handles):
            if uuid in _text(self._nvml.nvmlDeviceGetUUID(handle)):
                self._ours = number

    def read_all(self) -> list[DeviceReading]:
        return [self._read(handle) for handle in self._handles]

    def read(self) -> DeviceReading:
        return self._read(self._handles[self._ours])

    def pick(self, readings: list[DeviceReading]) -> DeviceReading:
        """Our card's reading among those of `read_all`, taken before it was known which card is ours."""
        return readings[self._ours]

    def name(self) -> str:
        return _text(self._nvml.nvmlDeviceGetName(self._handles[self._ours]))

    def version(self) -> str:
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    def _read(self, handle: Any) -> DeviceReading:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle, version=self._nvml.nvmlMemory_v2)
        return DeviceReading(
            used_bytes=int(memory.used), reserved_bytes=int(memory.reserved), total_bytes=int(memory.total),
            process_bytes=self._own_bytes(handle),
        )  # fmt: skip

    def _own_bytes(self, handle: Any) -> int | None:
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError:  # not offered in every virtual machine
            return None
        own = [p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory is not None]
        return int(own[0]) if own else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
