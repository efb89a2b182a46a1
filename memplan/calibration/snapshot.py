"""Records the caching allocator's own history over a stretch of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memplan.calibration.meter import Meter
from memplan.calibration.trace import Part, compact, write_trace


@dataclass
class Recorder:
    """Starts and stops the history; every stretch becomes one part of the trace file."""

    meter: Meter
    stacks: str = "all"
    """`all` names C++ operators too, and backward has no other frames; `python` is quicker."""
    parts: list[Part] = field(default_factory=list)
    _name: str = ""
    _first_mark: int = 0
    _first_counts: tuple[int, int] = (0, 0)
    _segments: list[dict[str, Any]] = field(default_factory=list)

    def start(self, name: str) -> None:
        # Names from the dynamic symbol table: the other modes start a debugger's symboliser and take minutes.
        os.environ.setdefault("TORCH_SYMBOLIZE_MODE", "dladdr")
        self._name, self._first_mark = name, len(self.meter.marks)
        self._segments = torch.cuda.memory_snapshot()
        self.meter.counts, self._first_counts = True, self.meter.count()
        torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks=self.stacks, clear_history=True)

    def stop(self) -> None:
        if not self._name:
            return
        name, self._name = self._name, ""
        traces = torch.cuda.memory._snapshot()["device_traces"]
        torch.cuda.memory._record_memory_history(enabled=None)
        self.meter.counts = False
        allocs, frees = self._first_counts
        marks = [
            [m.step, m.micro_step, m.phase, m.num_allocs - allocs, m.num_frees - frees]
            for m in self.meter.marks[self._first_mark :]
        ]
        number = self.meter.device.index or torch.cuda.current_device()
        self.parts.append(compact(name, marks, self._segments, traces[number]))
        self._segments = []

    def write(self, path: Path) -> None:
        self.stop()
        if self.parts:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_trace(path, self.parts)
