"""The meter and the recorder against a pretended CUDA and NVML."""

import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from memplan.calibration.meter import Driver, Meter  # noqa: E402
from memplan.calibration.snapshot import Recorder  # noqa: E402
from memplan.calibration.trace import read_trace  # noqa: E402
from memplan.errors import MemplanError  # noqa: E402


class FakeCuda:
    """An allocator that only counts."""

    def __init__(self):
        self.live = self.peak = self.num_allocs = self.num_frees = 0
        self.history = []

    def malloc(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)
        self.history.append({"action": "alloc", "addr": self.num_allocs, "size": size, "stream": 0, "frames": []})
        self.num_allocs += 1

    def free(self, size):
        self.live -= size
        self.history.append({"action": "free_completed", "addr": 0, "size": size, "stream": 0, "frames": []})
        self.num_frees += 1

    def reset_peak(self, device):
        self.peak = self.live


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    stats = {
        "allocation.all.allocated": lambda: fake.num_allocs,
        "allocation.all.freed": lambda: fake.num_frees,
    }
    replaced = {
        "reset_peak_memory_stats": fake.reset_peak,
        "memory_allocated": lambda device: fake.live,
        "max_memory_allocated": lambda device: fake.peak,
        "memory_reserved": lambda device: 2 * fake.live,
        "max_memory_reserved": lambda device: 2 * fake.peak,
        "memory_stats": lambda device: {name: read() for name, read in stats.items()},
        "memory_snapshot": list,
        "current_device": lambda: 0,
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)

    def record(enabled, **options):
        if enabled:
            fake.history.clear()

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"device_traces": [list(fake.history)]})
    return fake


def test_peaks_are_of_their_own_phase_and_phases_follow_each_other(cuda):
    meter = Meter(torch.device("cuda", 0))
    meter.begin("forward", 1)
    cuda.malloc(100)
    cuda.malloc(50)
    cuda.free(50)
    meter.begin("backward", 1)
    cuda.free(100)
    cuda.malloc(30)
    meter.end()
    meter.end()
    forward, backward = meter.rows
    assert (forward.peak_allocated_bytes, forward.allocated_bytes) == (150, 100)
    assert (backward.peak_allocated_bytes, backward.allocated_bytes) == (100, 30)
    assert backward.peak_reserved_bytes == 200
    assert meter.current is None


def test_a_trace_is_cut_into_parts_and_phases(cuda, tmp_path):
    meter = Meter(torch.device("cuda", 0))
    recorder = Recorder(meter)
    recorder.start("load")
    meter.begin("load")
    cuda.malloc(7)
    recorder.stop()
    cuda.malloc(8)  # between the parts
    recorder.start("step 2")
    meter.begin("forward", 2)
    cuda.malloc(9)
    meter.begin("backward", 2)
    cuda.free(9)
    cuda.malloc(10)
    recorder.write(tmp_path / "traces" / "one.jsonl.gz")
    load, step = read_trace(tmp_path / "traces" / "one.jsonl.gz")
    assert [(load.phase(e), e.num_bytes) for e in load.events] == [("load", 7)]
    assert [(step.phase(e), e.action, e.num_bytes) for e in step.events] == [
        ("forward", "a", 9), ("backward", "f", 9), ("backward", "a", 10),
    ]  # fmt: skip


def test_the_card_is_known_by_its_uuid(monkeypatch):
    class NoPermission(Exception):
        pass

    def refuse(*_):
        raise NoPermission

    used = {"first": 1, "second": 2}

    def memory(handle, version):
        return SimpleNamespace(used=used[handle], reserved=1, total=9)

    nvml = SimpleNamespace(
        nvmlInit=refuse, nvmlShutdown=lambda: None, nvmlMemory_v2=2, NVMLError=NoPermission,
        nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=lambda index: ("first", "second")[index],
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetComputeRunningProcesses=refuse,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with pytest.raises(MemplanError, match="no NVIDIA driver"):
        Driver()
    monkeypatch.setattr(nvml, "nvmlInit", lambda: None)
    driver = Driver()
    before = driver.read_all()
    driver.choose("second")
    used["second"] = 5
    assert driver.pick(before).used_bytes == 2
    assert (driver.read().used_bytes, driver.read().process_bytes) == (5, None)
