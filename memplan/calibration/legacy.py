"""The record format of the harness that took the first measurements, read into today's `Record`.

That harness ran a plain loop with clipping on and `outputs` dropped before backward: LoRA rank 16 on all
linear layers, bf16 weights, no autocast, foreach AdamW, k-bit preparation, double quantisation, unless a case
said otherwise. Its runs of TRL's SFTTrainer carry no figures per phase.
"""

from __future__ import annotations

from typing import Any

from memplan.calibration.record import Case, PhaseFigures, Record

_PHASES = {"fwd": "forward", "bwd": "backward", "clip": "clip", "opt": "optimizer", "zero": "zero"}
_OPTIMIZERS = {"adamw_fused": "adamw_torch_fused"}
_CASE_KEYS = {"id", "name", "model", "harness", "method", "batch", "seq", "ckpt", "dtype", "amp", "optim",
              "rank", "targets"}  # fmt: skip


def is_legacy(row: dict[str, Any]) -> bool:
    return isinstance(row.get("case"), dict) and "model" in row["case"]


def record_from_legacy(row: dict[str, Any]) -> Record:
    """One row of the earlier format.

    Raises:
        ValueError: the case has a key whose meaning is not known, so the run cannot be told exactly.
    """
    case, stated = row["case"], _stated(row["case"])
    phases = tuple(
        PhaseFigures(
            step=number, micro_step=0, phase=_PHASES[short],
            allocated_bytes=step[short]["alloc"], peak_allocated_bytes=step[short]["peak"],
            reserved_bytes=step[short]["res"], peak_reserved_bytes=step[short]["peak_res"],
        )
        for number, step in enumerate(row["steps"], 1) for short in _PHASES if short in step
    )  # fmt: skip
    seconds = tuple(step["s"] for step in row["steps"])
    tokens = stated["micro_batch_size"] * stated["seq_len"]
    return Record(
        case=Case(id=case["id"], hf_config=case["model"], config=stated, num_steps=len(seconds)),
        status="ok",
        phases=phases,
        peak_allocated_bytes=row["peak_alloc"],
        peak_reserved_bytes=row["peak_reserved"],
        peak_phase=_PHASES.get(row["peak_phase"]),
        process_bytes=row["nvml_end"],
        num_params=row["n_params"],
        # Of a TRL run the figure was taken before the trainer added its adapters.
        num_trainable_params=None if stated["stack"] == "trl" else row["n_trainable"],
        trainable_dtypes=() if stated["stack"] == "trl" else tuple(_short(name) for name in row["trainable_dtypes"]),
        load_seconds=row["load_s"],
        step_seconds=seconds,
        tokens_per_second=tokens / min(seconds) if phases else None,
    )


def _stated(case: dict[str, Any]) -> dict[str, Any]:
    unknown = set(case) - _CASE_KEYS
    if unknown:
        raise ValueError(f"unknown case key `{min(unknown)}`")
    stated: dict[str, Any] = {
        "method": case["method"],
        "stack": case.get("harness", "torch"),
        "micro_batch_size": case["batch"],
        "seq_len": case["seq"],
    }
    if case["method"] != "full":
        stated["rank"] = case.get("rank", 16)
        stated["target_modules"] = case.get("targets", "all-linear")
    if stated["stack"] == "torch":
        optimizer = case.get("optim", "adamw_torch")
        stated["gradient_checkpointing"] = case.get("ckpt", False)
        stated["weight_dtype"] = case.get("dtype", "bf16")
        stated["autocast"] = case.get("amp", False)
        stated["optimizer"] = _OPTIMIZERS.get(optimizer, optimizer)
    return stated


def _short(name: str) -> str:
    return name.removeprefix("torch.")
