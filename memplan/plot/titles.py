"""What pictures say of the run they show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memplan.plot.style import LABELS

if TYPE_CHECKING:
    from memplan.estimate import Estimate

KNOBS = {
    "rank": "LoRA rank",
    "seq_len": "tokens per sequence",
    "micro_batch_size": "micro-batch, sequences",
    "gradient_accumulation_steps": "gradient accumulation steps",
}


def knob_label(knob: str) -> str:
    return KNOBS.get(knob, knob.replace("_", " "))


def value_label(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else LABELS.get(str(value), str(value))


def run_title(runs: Sequence[Estimate], *, without: Sequence[str] = ()) -> str:
    """What all of `runs` share, in two lines; what the picture varies, and what varies with it, is left out."""
    configs = [run.config for run in runs]
    adapters = any(c.trains_adapters for c in configs)

    def shared(field: str) -> bool:
        return field not in without and len({getattr(c, field) for c in configs}) == 1

    first, c = [], configs[0]
    if "model" not in without:
        first.append(runs[0].model.label)
    if shared("method"):
        first.append(LABELS[c.method])
    if adapters and "rank" not in without:
        first.append(f"rank {next(c.rank for c in configs if c.trains_adapters)}")
    if shared("micro_batch_size"):
        first.append(f"micro-batch {c.micro_batch_size}")
    if shared("seq_len"):
        first.append(f"{c.seq_len:,} tokens")
    second = [f"{name} {getattr(c, name)}" for name in ("stack", "loss") if shared(name)]
    second += [str(getattr(c, name)) for name in ("optimizer", "attention") if shared(name)]
    if shared("gradient_checkpointing"):
        second.append("checkpointing" if c.gradient_checkpointing else "no checkpointing")
    return ", ".join(first) + "\n" + ", ".join(second)
