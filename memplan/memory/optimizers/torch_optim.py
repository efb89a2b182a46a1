"""torch.optim on CUDA, as torch 2.11 runs it when nothing else is asked: foreach, unless fused.

`_multi_tensor_*` work group by group of equal dtype; a list of temporaries lives until the next group's replaces
it. `step` counters are on the host, save those of a fused optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence

from memplan.memory.optimizers.plan import Group, Plan, by_dtype


def adamw_foreach(plan: Plan, groups: Sequence[Group]) -> None:
    """torch/optim/adam.py `_multi_tensor_adam`: exp_avg_sq_sqrt is one more copy of the parameters."""
    for group in groups:
        _adam_states(plan, group, step_on_device=False)
        _lists(plan, group, num_lists=1)


def adamw_forloop(plan: Plan, groups: Sequence[Group]) -> None:
    """torch/optim/adam.py `_single_tensor_adam`: `denom` lives until the next parameter's replaces it."""
    for group in groups:
        _adam_states(plan, group, step_on_device=False)
        denom = None
        for p in group:
            root = plan.hold(p.num_bytes)
            quotient = plan.hold(p.num_bytes)
            plan.release(root)
            if denom is not None:
                plan.release(denom)
            denom = quotient
        if denom is not None:
            plan.release(denom)


def adamw_fused(plan: Plan, groups: Sequence[Group]) -> None:
    """torch/optim/adam.py `_fused_adam`: nothing but the states; `step` is a tensor on the device."""
    for group in groups:
        _adam_states(plan, group, step_on_device=True)


def sgd(plan: Plan, groups: Sequence[Group]) -> None:
    """torch/optim/sgd.py `_multi_tensor_sgd` without momentum: in place."""


def sgd_momentum(plan: Plan, groups: Sequence[Group]) -> None:
    """The first step clones the gradients into momentum buffers."""
    for group in groups:
        for same in by_dtype(group):
            for p in same:
                plan.state(p.num_bytes)


def rmsprop(plan: Plan, groups: Sequence[Group]) -> None:
    """torch/optim/rmsprop.py `_multi_tensor_rmsprop`, no momentum, not centered: one state, `avg` the temporary."""
    for group in groups:
        for p in group:
            plan.state(p.num_bytes)
        _lists(plan, group, num_lists=1)


def adagrad(plan: Plan, groups: Sequence[Group]) -> None:
    """torch/optim/adagrad.py: `sum` is made by the constructor; `std` and `numerator` are the temporaries."""
    for group in groups:
        for p in group:
            plan.state(p.num_bytes, at_once=True)
    for group in groups:
        _lists(plan, group, num_lists=2)


def _adam_states(plan: Plan, group: Group, *, step_on_device: bool) -> None:
    for p in group:
        if step_on_device:
            plan.state(4)
        plan.state(p.num_bytes)
        plan.state(p.num_bytes)


def _lists(plan: Plan, group: Group, *, num_lists: int) -> None:
    """`num_lists` lists of temporaries like the parameters, each replaced by the next dtype's."""
    held: list[list[int]] = [[] for _ in range(num_lists)]
    for same in by_dtype(group):
        for index in range(num_lists):
            fresh = [plan.hold(p.num_bytes) for p in same]
            plan.release(*held[index])
            held[index] = fresh
    for slots in held:
        plan.release(*slots)
