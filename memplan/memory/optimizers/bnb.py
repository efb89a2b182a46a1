"""bitsandbytes 0.50.2 optim/optimizer.py: 8-bit states in blocks, fp32 for small tensors, paged states.

    8 bit    state      one byte an element, from 4096 elements on (`min_8bit_size`), else fp32
             absmax     fp32 a block of 256
             qmap       two tables of 256 fp32, once: signed for the first state, unsigned for the second
    paged    a state of 1e5 elements or more is in CUDA managed memory, its absmax is not

Steps are in place. Trainer tells the 8-bit optimizers to keep the states of embeddings in fp32
(transformers 5.17 trainer.py `create_optimizer`, GlobalOptimManager).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from memplan.memory.optimizers.plan import Group, Param, Plan

MIN_8BIT_ELEMENTS = 4096
BLOCK_ELEMENTS = 256
QMAP_BYTES = 256 * 4
MIN_PAGED_ELEMENTS = 100_000

Steps = Callable[[Plan, Sequence[Group]], None]


def two_states(*, bits: int, paged: bool = False) -> Steps:
    """Adam: Optimizer2State."""
    return _in_place(2, bits, paged, _states)


def one_state(*, bits: int, paged: bool = False) -> Steps:
    """Lion, RMSprop: Optimizer1State."""
    return _in_place(1, bits, paged, _states)


def ademamix(*, bits: int, paged: bool = False) -> Steps:
    """optim/ademamix.py: the first state is two fast and slow averages in one tensor, absmax comes first."""
    return _in_place(2, bits, paged, _ademamix_states)


def _in_place(num_states: int, bits: int, paged: bool, states: Callable[[Plan, Param, int, int, bool], None]) -> Steps:
    def steps(plan: Plan, groups: Sequence[Group]) -> None:
        has_qmaps = False
        for group in groups:
            for p in group:
                in_8_bit = bits == 8 and p.numel >= MIN_8BIT_ELEMENTS and not p.in_fp32
                if in_8_bit and not has_qmaps:
                    has_qmaps = True
                    for _ in range(num_states):
                        plan.state(QMAP_BYTES)
                states(plan, p, num_states, 1 if in_8_bit else 4, paged)

    return steps


def _states(plan: Plan, p: Param, num_states: int, itemsize: int, paged: bool) -> None:
    for _ in range(num_states):
        _buffer(plan, p, p.numel * itemsize, paged)
    if itemsize == 1:
        for _ in range(num_states):
            plan.state(_absmax_bytes(p))


def _ademamix_states(plan: Plan, p: Param, num_states: int, itemsize: int, paged: bool) -> None:
    if itemsize == 1:
        plan.state(2 * _absmax_bytes(p))
        plan.state(_absmax_bytes(p))
    _buffer(plan, p, 2 * p.numel * itemsize, paged)
    _buffer(plan, p, p.numel * itemsize, paged)


def _absmax_bytes(p: Param) -> int:
    return -(-p.numel // BLOCK_ELEMENTS) * 4


def _buffer(plan: Plan, p: Param, num_bytes: int, paged: bool) -> None:
    """`get_state_buffer`."""
    if paged and p.numel >= MIN_PAGED_ELEMENTS:
        plan.managed_bytes += num_bytes
    else:
        plan.state(num_bytes)
