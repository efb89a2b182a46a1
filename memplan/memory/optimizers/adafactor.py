"""transformers 5.17 optimization.py `Adafactor`, as Trainer makes it: no first moment, no relative step.

It works one parameter at a time in fp32. Its locals keep the tensors of one parameter alive while the next one's
are made, which this mirrors line by line.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from memplan.memory.optimizers.plan import Group, Param, Plan


def adafactor(plan: Plan, groups: Sequence[Group]) -> None:
    held = _Locals(plan)
    for group in groups:
        for p in group:
            _update(plan, held, p)
    held.drop("grad", "param", "update")


class _Locals:
    """The local variables of `step` that hold tensors of a parameter's size."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.slots: dict[str, int] = {}

    def set(self, name: str, slot: int) -> None:
        self.drop(name)
        self.slots[name] = slot

    def drop(self, *names: str) -> None:
        for name in names:
            if name in self.slots:
                self.plan.release(self.slots.pop(name))


def _update(plan: Plan, held: _Locals, p: Param) -> None:
    size, factored = p.numel * 4, len(p.shape) >= 2
    held.drop("grad")  # grad = p.grad
    if p.dtype.is_half:
        held.set("grad", plan.hold(size))
    if factored:
        plan.state(prod(p.shape[:-1]) * 4)
        plan.state(prod(p.shape) // p.shape[-2] * 4)
    else:
        plan.state(size)
    held.drop("param")  # p_data_fp32 = p
    if p.dtype.is_half:
        held.set("param", plan.hold(size))
    norm = _norm(plan, p.numel)
    plan.replace(None)  # state["RMS"] = tensor.norm(2) / (tensor.numel() ** 0.5)
    plan.release(norm)
    square = plan.hold(size)
    held_update = plan.hold(size)  # (grad**2) + eps
    plan.release(square)
    held.set("update", held_update)
    if factored:
        _factored_update(plan, held, p)
    else:
        held.set("update", plan.hold(size))  # exp_avg_sq.rsqrt().mul_(grad)
    norm = _norm(plan, p.numel)
    rms = plan.hold(4)
    plan.release(norm)
    clipped = plan.hold(4)  # (self._rms(update) / clip_threshold).clamp_(min=1.0)
    plan.release(rms, clipped)
    plan.release(plan.hold(size))  # p_data_fp32.add_(-update)


def _factored_update(plan: Plan, held: _Locals, p: Param) -> None:
    rows, cols = p.shape[-2:]
    others = prod(p.shape[:-2])
    row_mean = plan.hold(others * rows * 4)
    plan.reduce(cols, others * rows, reduces_last=True)
    plan.release(row_mean)
    col_mean = plan.hold(others * cols * 4)
    plan.reduce(rows, others * cols, reduces_last=False)
    plan.release(col_mean)
    # _approx_sq_grad
    mean = plan.hold(others * 4)
    plan.reduce(rows, others, reduces_last=True)
    r_factor = plan.hold(others * rows * 4)
    plan.release(mean)
    c_factor = plan.hold(others * cols * 4)
    update = plan.hold(p.numel * 4)
    plan.release(c_factor, r_factor)
    held.set("update", update)


def _norm(plan: Plan, numel: int) -> int:
    """tensor.norm(2) of fp32: the result and, while it runs, the blocks' partial sums."""
    result = plan.hold(4)
    plan.reduce(numel, 1, reduces_last=True)
    return result
