"""The allocation trace of a run, compact: gzip of JSON lines.

A file holds parts (the load and one step, or the whole run). A part is a header line, then a line an event:

    {"part": "step 2", "marks": [[step, micro_step, phase, allocations, frees before it], …],
     "segments": […], "stacks": [[frame, …], …], "num_events": N, "num_dropped": 0}
    [action, address, bytes, mark, stack, stream if not 0]

`mark` and `stack` index into the header's lists (-1: none). `bytes` is what was asked for, before the
allocator rounds. `segments` is the allocator's state as the part begins: [address, bytes, "small" | "large",
stream, [[bytes, requested bytes, "a" | "i"], …]], the inner lists being the segment's blocks, active or not.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

MAX_FILE_BYTES = 8 * 2**20
_ACTIONS = {"alloc": "a", "free_completed": "f", "segment_alloc": "sa", "segment_free": "sf",
            "segment_map": "sm", "segment_unmap": "su", "oom": "oom"}  # fmt: skip
_CPP = (
    (re.compile(r"torch::autograd::generated::(\w+?)::apply"), "{}"),
    (re.compile(r"torch::autograd::(AccumulateGrad|CopySlices|InputBuffer)::\w+"), "{}"),
    (re.compile(r"at::_ops::(\w+)::(?:call|redispatch)"), "aten.{}"),
    (re.compile(r"at::native::(?:\(anonymous namespace\)::)?(\w+)"), "native.{}"),
    (re.compile(r"at::cuda::(?:blas::)?(\w*(?:Workspace|blas|gemm)\w*)", re.IGNORECASE), "cuda.{}"),
)
_DULL = ("torch/nn/modules/module.py", "torch/nn/modules/container.py", "torch/utils/_contextlib.py",
         "torch/_tensor.py", "torch/_compile.py", "torch/_dynamo/", "torch/autograd/", "runpy.py",
         "<frozen")  # fmt: skip
_MAX_CPP, _MAX_PYTHON = 4, 7


class Event(NamedTuple):
    """One action of the allocator: `a` alloc, `f` free, `sa` and `sf` a segment taken or given back."""

    action: str
    address: int
    num_bytes: int
    mark: int
    stack: int
    stream: int = 0


@dataclass(frozen=True)
class Part:
    """A stretch of the trace with its marks, first state and stacks (see the module's docstring)."""

    name: str
    marks: list[list[Any]]
    segments: list[list[Any]]
    stacks: list[list[str]]
    events: list[Event]
    num_dropped: int = 0

    def phase(self, event: Event) -> str:
        return str(self.marks[event.mark][2]) if event.mark >= 0 else ""

    def entries(self) -> list[dict[str, Any]]:
        """The events as torch's own history words them, for `memory.allocator_trace.replay_trace`."""
        names = {short: long for long, short in _ACTIONS.items()}
        return [
            {"action": names[e.action], "addr": e.address, "size": e.num_bytes, "stream": e.stream} for e in self.events
        ]

    def frames(self, event: Event) -> list[str]:
        """Innermost first: C++ operators (`aten.mm`, `MmBackward0`), then Python lines."""
        return self.stacks[event.stack] if event.stack >= 0 else []


@dataclass
class _Stacks:
    index: dict[tuple[str, ...], int] = field(default_factory=dict)

    def number(self, frames: Sequence[dict[str, Any]]) -> int:
        short = short_stack(frames)
        return self.index.setdefault(short, len(self.index)) if short else -1


def compact(
    name: str, marks: list[list[Any]], segments: Iterable[dict[str, Any]], entries: Iterable[dict[str, Any]]
) -> Part:
    """A Part from what `torch.cuda.memory._snapshot()` calls segments and a device's trace."""
    stacks, events = _Stacks(), []
    allocs, frees = [mark[3] for mark in marks], [mark[4] for mark in marks]
    num_allocs = num_frees = 0
    for entry in entries:
        action = _ACTIONS.get(entry["action"])
        if action is None:
            continue
        # A phase is told by counts: the trace's clock is not exact enough to cut at. What serves the next
        # allocation (a segment taken, or given back to make room) belongs with it.
        mark = bisect_right(frees, num_frees) - 1 if action == "f" else bisect_right(allocs, num_allocs) - 1
        num_allocs += action == "a"
        num_frees += action == "f"
        stack = stacks.number(entry.get("frames", ())) if action in ("a", "oom") else -1
        address, stream = int(entry.get("addr", 0)), int(entry.get("stream", 0))
        events.append(Event(action, address, int(entry["size"]), mark, stack, stream))
    state = [
        [
            s["address"], s["total_size"], s["segment_type"], s.get("stream", 0),
            [[b["size"], b.get("requested_size", b["size"]), "i" if b["state"] == "inactive" else "a"]
             for b in s["blocks"]],
        ]
        for s in segments
    ]  # fmt: skip
    return Part(name, marks, state, [list(stack) for stack in stacks.index], events)


def short_stack(frames: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The few frames that say which operator allocated, innermost first."""
    cpp: list[str] = []
    python: list[str] = []
    for frame in frames:
        file, label = frame["filename"], frame["name"]
        if file.endswith(".py") or file.startswith("<"):
            if len(python) < _MAX_PYTHON and not any(dull in file for dull in _DULL):
                python.append(f"{'/'.join(file.split('/')[-2:])}:{frame['line']} {label}")
            continue
        for pattern, shape in _CPP:
            if found := pattern.search(label):
                named = shape.format(found.group(1))
                if len(cpp) < _MAX_CPP and (not cpp or cpp[-1] != named):
                    cpp.append(named)
                break
    return (*cpp, *python)


def write_trace(path: str | Path, parts: Sequence[Part], *, max_bytes: int = MAX_FILE_BYTES) -> None:
    """Write the parts; events beyond `max_bytes` of file are dropped, and the header says how many."""
    parts = list(parts)
    while True:
        blob = gzip.compress("\n".join(_lines(parts)).encode(), 6)
        if len(blob) <= max_bytes:
            break
        share = 0.9 * max_bytes / len(blob)
        parts = [
            Part(p.name, p.marks, p.segments, p.stacks, kept := p.events[: int(len(p.events) * share)],
                 p.num_dropped + len(p.events) - len(kept))
            for p in parts
        ]  # fmt: skip
    Path(path).write_bytes(blob)


def read_trace(path: str | Path) -> list[Part]:
    """The parts of a trace file."""
    parts = []
    lines = iter(gzip.decompress(Path(path).read_bytes()).decode().splitlines())
    for line in lines:
        head = json.loads(line)
        events = [Event(*json.loads(next(lines))) for _ in range(head["num_events"])]
        parts.append(Part(head["part"], head["marks"], head["segments"], head["stacks"], events, head["num_dropped"]))
    return parts


def _lines(parts: Iterable[Part]) -> Iterable[str]:
    for part in parts:
        head = {
            "part": part.name, "marks": part.marks, "segments": part.segments, "stacks": part.stacks,
            "num_events": len(part.events), "num_dropped": part.num_dropped,
        }  # fmt: skip
        yield json.dumps(head, separators=(",", ":"))
        for event in part.events:
            yield json.dumps(event if event.stream else event[:5], separators=(",", ":"))
