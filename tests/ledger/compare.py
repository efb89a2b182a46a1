"""The played step against the real model's, phase by phase: bytes alive at the end of each phase, and its peak.

Both sides run two steps: the optimizer's states appear in the first, every later step is as the second.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from memplan.architectures import decoder_for
from memplan.memory.composer import Composer
from memplan.memory.ledger import Ledger, PhasePeak, fold
from memplan.model_spec import ModelSpec
from memplan.ops.device import FAKE_CPU
from memplan.train_config import TrainConfig
from tests.oracle.loop import PHASES
from tests.oracle.step import OracleResult, run

# TrainConfig's names, where the oracle has shorter ones.
_RENAMED = {"micro_batch_size": "batch", "seq_len": "seq", "gradient_accumulation_steps": "accumulation"}
# What the oracle runs one way only.
_FIXED = {"quant_type": "nf4", "max_grad_norm": 1.0}


class Figure(NamedTuple):
    """One figure of a step: `alloc` is what is alive when the phase ends, `peak` the most within it; bytes."""

    step: int
    phase: str
    name: str
    real: int
    played: int

    @property
    def error(self) -> float:
        return (self.played - self.real) / self.real

    def __str__(self) -> str:
        return (
            f"step {self.step} {self.phase:9} {self.name:5} real {self.real:>15,} played {self.played:>15,}"
            f" off by {self.played - self.real:+,} ({self.error:+.4%})"
        )


def figures(hf_config: dict[str, Any], config: TrainConfig) -> list[Figure]:
    """Every figure of both steps: the real libraries' on fake tensors, and memplan's."""
    real, played = real_step(hf_config, config), played_step(hf_config, config)
    found = []
    for step, (phases, mine) in enumerate(zip(real.phases, played.phases, strict=True)):
        for phase in PHASES:
            alloc, peak = phases[phase]
            end_bytes, peak_bytes = _phase(mine, phase)
            found.append(Figure(step, phase, "alloc", alloc, end_bytes))
            found.append(Figure(step, phase, "peak", peak, peak_bytes))
    return found


def real_step(hf_config: dict[str, Any], config: TrainConfig, *, events: bool = False) -> OracleResult:
    """The run `config` of the real libraries, without a GPU."""
    stated = config.model_dump()
    for name, value in _FIXED.items():
        assert stated.pop(name) == value, f"the oracle runs {name}={value}"
    if config.method == "full":
        del stated["rank"]
    return run(hf_config, **{_RENAMED.get(name, name): value for name, value in stated.items()}, events=events)


def played_step(hf_config: dict[str, Any], config: TrainConfig) -> Ledger:
    """The same run, played by memplan on a device whose kernels take no buffers of their own choosing."""
    decoder = decoder_for(ModelSpec.from_hf_config(hf_config), config, FAKE_CPU)
    return fold(Composer(decoder, workspace_bytes=0, num_steps=2).compose())


def _phase(played: dict[str, PhasePeak], name: str) -> tuple[int, int]:
    """memplan tells the loss from the forward pass; the oracle counts it in."""
    if name == "forward":
        return played["loss"].end_bytes, max(played["forward"].peak_bytes, played["loss"].peak_bytes)
    return played[name].end_bytes, played[name].peak_bytes
