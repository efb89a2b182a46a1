"""Runs one case in this process and returns its record. The process must not have used CUDA before."""

from __future__ import annotations

import math
import re
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from memplan.calibration.build import build_model
from memplan.calibration.loop import Trained
from memplan.calibration.meter import Driver, Meter, allocator_figures
from memplan.calibration.optimizers import state_bytes
from memplan.calibration.record import Case, DeviceReading, OutOfMemory, Record
from memplan.calibration.snapshot import Recorder

_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass
class _Run:
    """What is known so far; whatever goes wrong, a record can be made of it."""

    case: Case
    meter: Meter
    facts: dict[str, Any] = field(default_factory=dict)
    readings: dict[str, DeviceReading] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def record(self, **more: Any) -> Record:
        rows = tuple(self.meter.rows)
        steps = [row for row in rows if row.step > 0]
        top = max(steps, key=lambda row: row.peak_allocated_bytes, default=None)
        end = self.readings.get("end")
        return Record(
            case=self.case,
            phases=rows,
            peak_allocated_bytes=top.peak_allocated_bytes if top else None,
            peak_reserved_bytes=max(row.peak_reserved_bytes for row in steps) if steps else None,
            peak_phase=top.phase if top else None,
            process_bytes=end.used_bytes + end.reserved_bytes if end else None,
            device=self.readings,
            wall_seconds=round(time.perf_counter() - self.began, 3),
            **self.facts,
            **more,
        )


def run_case(case: Case, *, device: str = "cuda", trace_path: Path | None = None, stacks: str = "all") -> Record:
    """Measure `case`. Running out of memory, or an error of the libraries, is a record too, no exception."""
    where = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    run = _Run(case, Meter(where))
    recorder = Recorder(run.meter, stacks) if case.snapshot and device != "cpu" else None
    try:
        _measure(run, recorder)
    except torch.OutOfMemoryError as error:
        return run.record(status="oom", oom=_out_of_memory(run.meter, str(error)))
    except Exception as error:
        if "out of memory" in str(error) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
            return run.record(status="oom", oom=_out_of_memory(run.meter, str(error)), error=str(error)[:300])
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        traceback.print_exc()
        return run.record(status="error", error=f"{type(error).__name__}: {str(error)[:600]} ({place})")
    finally:
        if recorder is not None and trace_path is not None:
            recorder.write(trace_path)
    return run.record(status="ok")


def _measure(run: _Run, recorder: Recorder | None) -> None:
    case, config, meter = run.case, run.case.train_config(), run.meter
    driver = _open_context(run, recorder)
    if case.memory_limit_bytes is not None and meter.device.type == "cuda":
        total = torch.cuda.get_device_properties(meter.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.memory_limit_bytes / total), meter.device)
    torch.manual_seed(0)

    meter.begin("load")
    began = time.perf_counter()
    model = build_model(case, config, meter.device)
    meter.synchronize()
    run.facts["load_seconds"] = round(time.perf_counter() - began, 3)
    run.facts["num_params"] = count_params(model)
    meter.begin("prepare")
    if driver:
        run.readings["load"] = driver.read()

    def ready(model: Any) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        run.facts["num_trainable_params"] = sum(p.numel() for p in trained)
        run.facts["trainable_dtypes"] = tuple(sorted({str(p.dtype).removeprefix("torch.") for p in trained}))
        meter.end()
        if recorder and case.snapshot_step:
            recorder.stop()

    def around_step(step: int, begins: bool) -> None:
        if recorder and step == case.snapshot_step:
            if begins:
                recorder.start(f"step {step}")
            else:
                recorder.stop()

    done = _train(case, config, model, meter, ready, around_step)
    meter.end()
    run.facts["step_seconds"] = tuple(round(s, 5) for s in done.step_seconds)
    if done.step_seconds:
        tokens = config.tokens_per_micro_batch * config.gradient_accumulation_steps
        run.facts["tokens_per_second"] = round(tokens / min(done.step_seconds), 1)
    run.facts["optimizer_state_bytes"] = state_bytes(done.optimizer, meter.device)
    if driver:
        run.readings["end"] = driver.read()


def _train(case: Case, config: Any, model: Any, meter: Meter, ready: Any, around_step: Any) -> Trained:
    if config.stack == "torch":
        from memplan.calibration.adapters import prepare
        from memplan.calibration.loop import train
        from memplan.calibration.losses import patch_loss

        patch_loss(model, config)
        model = prepare(model, config)
        ready(model)
        return train(model, config, meter, num_steps=case.num_steps, around_step=around_step)
    from memplan.calibration.trainers import train_with_library

    return train_with_library(case, config, model, meter, ready=ready, around_step=around_step)


def _open_context(run: _Run, recorder: Recorder | None) -> Driver | None:
    """Read the driver, open the CUDA context with one small tensor, read it again."""
    if run.meter.device.type != "cuda":
        return None
    driver = Driver()
    before = driver.read_all()
    torch.cuda.init()
    if recorder:
        recorder.start("load" if run.case.snapshot_step else "run")
    torch.zeros(1, device=run.meter.device)
    torch.cuda.synchronize()
    driver.choose(str(torch.cuda.get_device_properties(run.meter.device).uuid))
    run.readings["start"] = driver.pick(before)
    run.readings["context"] = driver.read()
    return driver


def count_params(model: Any) -> int:
    """Parameters of `model`, tied ones once, a quantised weight by the shape it stands for."""
    total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += math.prod(state.shape) if state is not None else parameter.numel()
    return total


def _out_of_memory(meter: Meter, message: str) -> OutOfMemory:
    open_ = meter.current
    allocated, _, reserved, _ = allocator_figures(meter.device)
    found = _TRIED.search(message)
    tried = int(float(found.group(1)) * _UNITS[found.group(2)]) if found else None
    return OutOfMemory(
        phase=open_.phase if open_ else "", step=open_.step if open_ else 0, tried_bytes=tried,
        allocated_bytes=allocated, reserved_bytes=reserved,
    )  # fmt: skip
