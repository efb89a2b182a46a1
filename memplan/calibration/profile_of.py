"""The constants of a GPU that finished runs give. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable

from memplan.calibration.record import Environment, Record
from memplan.errors import MemplanError
from memplan.profiles import GpuProfile


def profile_of(environment: Environment, records: Iterable[Record]) -> GpuProfile:
    """What driver, context and kernels took over `records`, none of which may have been held to a smaller card.

    Raises:
        MemplanError: no run ended well with what NVML reads at its end.
    """
    beside, contexts = [], []
    for record in records:
        if record.status != "ok" or record.case.memory_limit_bytes or not record.process_bytes:
            continue
        beside.append(record.process_bytes - (record.peak_reserved_bytes or 0))
        start, context = record.device.get("start"), record.device.get("context")
        if start is not None and context is not None:
            contexts.append(context.used_bytes - start.used_bytes)
    if not beside or not contexts:
        raise MemplanError("no run gave what a profile needs", hints=["the records say why"])
    driver, context_bytes = environment.gpu_reserved_bytes or 0, min(contexts)
    return GpuProfile(
        product=environment.gpu,
        total_bytes=environment.gpu_total_bytes,
        driver_bytes=driver,
        context_bytes=context_bytes,
        kernels_bytes=max(min(beside) - driver - context_bytes, 0),
        fused_attention_bytes=max(beside) - min(beside),
        num_runs=len(beside),
        environment=environment.model_dump(mode="json"),
    )
