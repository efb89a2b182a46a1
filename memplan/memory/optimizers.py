"""Optimizers: what they keep for each parameter and what a step allocates for a moment.

One row each, by its Hugging Face `optim` string. Sources: torch 2.11 torch/optim/adamw.py, sgd.py and
torch/nn/utils/clip_grad.py; transformers 5.17 optimization.py; bitsandbytes 0.50.2 optim/optimizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memplan.dtypes import DType
from memplan.ops.tensor import Shape, Tape, round_block


@dataclass(frozen=True, slots=True)
class Param:
    """A trained tensor as the optimizer sees it."""

    numel: int
    shape: Shape
    dtype: DType

    @property
    def num_bytes(self) -> int:
        return round_block(self.numel * self.dtype.itemsize)


@dataclass
class Plan:
    """Tapes of one optimizer over all parameters; `first` and `later` share their slots."""

    clip: Tape = field(default_factory=list)
    first: Tape = field(default_factory=list)
    later: Tape = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    @property
    def state_bytes(self) -> int:
        return sum(size for slot, size in self.first if size and self.kinds[slot] == "optimizer_states")

    def state(self, num_bytes: int) -> None:
        """A tensor that stays from the first step on."""
        if num_bytes:
            self.first.append((len(self.kinds), round_block(num_bytes)))
            self.kinds.append("optimizer_states")

    def temporaries(self, sizes: Sequence[int], *, both: bool = True) -> list[int]:
        slots = []
        for size in sizes:
            slot = len(self.kinds)
            self.kinds.append("temporaries")
            self.later.append((slot, size))
            if both:
                self.first.append((slot, size))
            slots.append(slot)
        return slots

    def free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.first.append((slot, 0))
            self.later.append((slot, 0))


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One row of the table."""

    name: str
    steps: Callable[[Plan, Sequence[Param]], None]
    source: str

    def plan(self, params: Sequence[Param], *, max_grad_norm: float) -> Plan:
        plan = Plan()
        if max_grad_norm:
            plan.clip = _clip(params)
        self.steps(plan, params)
        return plan


def _clip(params: Sequence[Param]) -> Tape:
    """clip_grad_norm_ on CUDA: one norm per gradient (foreach), their stack, the total and the coefficient."""
    count = len(params)
    tape: Tape = [(i, 512) for i in range(count)]
    stacked = round_block(count * 4)
    tape += [(count, stacked), (count + 1, 512)]
    tape += [(i, 0) for i in range(count + 2)]
    return tape


def _adam_states(plan: Plan, params: Sequence[Param], *, step_on_device: bool) -> None:
    for p in params:
        if step_on_device:
            plan.state(4)
        plan.state(p.num_bytes)
        plan.state(p.num_bytes)


def _adamw_foreach(plan: Plan, params: Sequence[Param]) -> None:
    """`_multi_tensor_adamw`: exp_avg_sq_sqrt = torch._foreach_sqrt(...) is one more copy of the parameters."""
    _adam_states(plan, params, step_on_device=False)
    plan.free(plan.temporaries([p.num_bytes for p in params]))


def _adamw_fused(plan: Plan, params: Sequence[Param]) -> None:
    """`_fused_adamw`: nothing but the states; `step` is a tensor on the device."""
    _adam_states(plan, params, step_on_device=True)


OPTIMIZERS: dict[str, Optimizer] = {
    row.name: row
    for row in (
        Optimizer("adamw_torch", _adamw_foreach, "torch/optim/adamw.py"),
        Optimizer("adamw_torch_fused", _adamw_fused, "torch/optim/adamw.py"),
    )
}
