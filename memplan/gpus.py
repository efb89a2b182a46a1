"""A GPU by name, by size (`24GiB`), or as the driver of this machine reports it."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from memplan.errors import MemplanError, UnknownNameError
from memplan.gpu_table import ROWS, GpuSpec
from memplan.units import parse_size

__all__ = ["COMMON", "DetectedGpu", "GpuSpec", "candidates", "detect", "get", "match_product", "names"]

# One card of each size people meet, smallest first: the columns of an overview.
COMMON = ("rtx-4060", "rtx-3060", "rtx-4080", "rtx-4090", "rtx-5090", "l40s", "a100-80gb", "h200")

_SIZE_LIKE = re.compile(r"\s*\d+(\.\d+)?\s*([kmgt]i?b)?\s*", re.IGNORECASE)
_MAKER_WORDS = re.compile(r"^(nvidia|amd|geforce|tesla|instinct)+")


def names() -> tuple[str, ...]:
    """Names of the GPUs in the table, in its order."""
    return tuple(row.name for row in ROWS)


def _key(text: str) -> str:
    """`text` without case, separators and the maker's name."""
    squeezed = re.sub(r"[^a-z0-9]", "", text.lower())
    return _MAKER_WORDS.sub("", squeezed) or squeezed


@cache
def _by_key() -> dict[str, tuple[GpuSpec, ...]]:
    """Rows by every spelling; more than one row behind a spelling means that it is ambiguous."""
    exact: dict[str, tuple[GpuSpec, ...]] = {}
    shared: dict[str, tuple[GpuSpec, ...]] = {}
    for row in ROWS:
        for spelling in (row.name, *row.aliases):
            exact[_key(spelling)] = (row,)
        # `4090` for `rtx-4090`, `A100-SXM4-80GB` as a driver writes it, `a100` for all its variants
        short = (row.name.removeprefix("rtx-"), row.group.removeprefix("rtx-"))
        for spelling in (*short, *row.products, row.group):
            if spelling and row not in shared.get(_key(spelling), ()):
                shared[_key(spelling)] = (*shared.get(_key(spelling), ()), row)
    return shared | exact


def candidates(text: str) -> tuple[GpuSpec, ...]:
    """Every row that `text` may mean: none if unknown, several if it is ambiguous."""
    return _by_key().get(_key(text), ())


def get(text: str) -> GpuSpec:
    """The GPU of that name (case and separators do not matter), a nameless one of a size such as `24GiB`, or
    with `auto` the one in this machine.

    Raises:
        UnknownNameError: no such GPU; the nearest names are in the hints.
        MemplanError: a name that several GPUs share (`a100`), a number without a unit, or `auto` without one.
    """
    if text.strip().lower() == "auto":
        return detect().spec
    rows = candidates(text)
    if not rows and _SIZE_LIKE.fullmatch(text):
        return GpuSpec(name=text.strip(), memory_bytes=parse_size(text), memory_source="as given")
    if len(rows) == 1:
        return rows[0]
    if rows:
        raise MemplanError(
            f"GPU `{text}` is ambiguous: " + ", ".join(f"`{row.name}`" for row in rows),
            hints=[f"name one of them, such as `{rows[-1].name}`"],
        )
    raise UnknownNameError("GPU", text, names(), listed_by="memplan gpus")


@dataclass(frozen=True, slots=True)
class DetectedGpu:
    """The GPU that a run started here would use."""

    spec: GpuSpec
    """Its row, with the memory this driver reports; without peaks if the table does not know the card."""
    index: int
    """Its number in NVML's order (by PCI bus)."""
    product: str
    """Its name, as the driver writes it."""
    total_bytes: int
    free_bytes: int
    driver: str


def match_product(product: str, total_bytes: int) -> GpuSpec | None:
    """The row of a driver's device name; of two variants with one name, the one nearer in memory."""
    wanted = _key(product)
    rows = [row for row in ROWS if wanted in map(_key, row.products)]
    return min(rows, key=lambda row: abs(row.memory_bytes - total_bytes), default=None)


def detect() -> DetectedGpu:
    """The NVIDIA GPU of this machine, read through NVML: the first of CUDA_VISIBLE_DEVICES, else the first.

    Raises:
        MemplanError: `nvidia-ml-py` is not installed, there is no NVIDIA driver, or no such GPU.
    """
    hints = ["name one with `--gpu rtx-4090`, or give its memory with `--gpu 24GiB`"]
    try:
        import pynvml
    except ImportError:
        raise MemplanError(
            "finding the GPU of this machine needs the package `nvidia-ml-py`",
            hints=["pip install 'memplan[gpu]'", *hints],
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise MemplanError(f"no NVIDIA GPU found: {error}", hints=hints) from None
    try:
        return _read(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except (pynvml.NVMLError, ValueError) as error:
        raise MemplanError(f"no NVIDIA GPU found: {error}", hints=hints) from None
    finally:
        pynvml.nvmlShutdown()


def _read(nvml: Any, visible: str | None) -> DetectedGpu:
    first = ("0" if visible is None else visible).split(",")[0].strip()
    if first in ("", "-1"):
        raise ValueError("CUDA_VISIBLE_DEVICES hides them all")
    by_index = first.isdecimal()  # else a UUID
    handle = nvml.nvmlDeviceGetHandleByIndex(int(first)) if by_index else nvml.nvmlDeviceGetHandleByUUID(first)
    product, memory = str(nvml.nvmlDeviceGetName(handle)), nvml.nvmlDeviceGetMemoryInfo(handle)
    row = match_product(product, memory.total) or GpuSpec(name=product, memory_bytes=memory.total)
    return DetectedGpu(
        spec=dataclasses.replace(row, memory_bytes=memory.total, memory_source="NVML on this machine"),
        index=nvml.nvmlDeviceGetIndex(handle),
        product=product,
        total_bytes=memory.total,
        free_bytes=memory.free,
        driver=str(nvml.nvmlSystemGetDriverVersion()),
    )
