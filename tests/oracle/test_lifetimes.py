"""The tracker's allocations and frees against those of the same model on real CPU tensors, seen by PyTorch's profiler.

No emulation of CUDA here: both sides run the CPU's kernels, so only what the tracker knows of lifetimes is on trial,
in-place gradient sums among it. What the CPU's kernels take besides is small and gone before the peaks.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from tests.oracle import cuda  # noqa: E402
from tests.oracle.configs import CONFIGS  # noqa: E402
from tests.oracle.model import build, fakeify  # noqa: E402
from tests.oracle.tracker import Tracker, block_bytes  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

BATCH, SEQ = 2, 80


def _model(family: str) -> Any:
    return build(
        CONFIGS[family],
        method="full",
        weight_dtype="fp32",
        attention="sdpa",
        rank=16,
        target_modules="all-linear",
        lora_dropout=0.0,
        use_dora=False,
        modules_to_save=(),
        double_quant=True,
        kbit_prep=True,
        adapter_dtype="fp32",
        gradient_checkpointing=False,
        reentrant=False,
    )[0]


def _no(_: Any) -> bool:  # a Mock would keep the tensor it was called with
    return False


def _peaks(sizes: list[int]) -> tuple[int, int]:
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return live, peak


def _tracked(model: Any) -> list[tuple[int, int]]:
    """(bytes left, peak) of forward and of backward, on fake tensors."""
    in_place = {
        op: kernel
        for op, kernel in cuda.KERNELS.items()
        if any(part in str(op) for part in ("index_put", "scatter", "grouped"))
    }
    tracker = Tracker(record=True, kernels=in_place, scalar=cuda.scalar_values(padding=False))
    with FakeTensorMode(), mock.patch("transformers.utils.import_utils.is_fake_tensor", _no):
        fakeify(model)
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.watch(tensor)
        with tracker:
            ids, labels = (torch.empty(BATCH, SEQ, dtype=torch.int64) for _ in range(2))
            tracker.begin("forward")
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            tracker.begin("backward")
            loss.backward()
            tracker.end()
            tracker.phase = "end"
    events = tracker.events or []
    return [_peaks([e.num_bytes for e in events if e.phase == phase]) for phase in ("forward", "backward")]


def _profiled(model: Any) -> list[tuple[int, int]]:
    """The same on real tensors."""
    from torch.profiler import ProfilerActivity, profile, record_function

    model = model.to_empty(device="cpu")
    getattr(model, "get_base_model", lambda: model)().tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
    ids, labels = torch.randint(3, 999, (BATCH, SEQ)), torch.randint(3, 999, (BATCH, SEQ))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function("forward"):
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        with record_function("backward"):
            loss.backward()
    spans: dict[str, tuple[int, int]] = {}
    blocks: list[tuple[int, int]] = []

    def walk(event: Any) -> None:
        if event.name in ("forward", "backward"):
            spans[event.name] = (event.start_time_ns, event.end_time_ns)
        if event.tag.name == "Allocation":
            blocks.append((event.start_time_ns, event.extra_fields.alloc_size))
        for child in event.children:
            walk(child)

    for event in profiler.profiler.kineto_results.experimental_event_tree():
        walk(event)
    found = []
    for begin, end in (spans["forward"], spans["backward"]):
        sizes = [size for time, size in sorted(blocks) if begin <= time <= end]
        found.append(_peaks([block_bytes(size) if size > 0 else -block_bytes(-size) for size in sizes]))
    return found


@pytest.mark.parametrize("family", ["llama", "stablelm", "falcon", "glm4", "qwen3_moe"])
def test_tracked_bytes_are_those_of_a_real_run(family: str) -> None:
    assert _tracked(_model(family)) == _profiled(_model(family))
