"""torch.nn.utils.clip_grad_norm_ on CUDA (torch 2.11 torch/nn/utils/clip_grad.py, foreach)."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.dtypes import DType
from memplan.memory.optimizers.plan import Param, by_dtype
from memplan.ops.tensor import Tape, round_block

CHUNK_ELEMENTS = 65536
"""`kChunkSize`, aten/src/ATen/native/cuda/MultiTensorApply.cuh."""


def clip_tape(params: Sequence[Param]) -> Tape:
    """One norm a gradient, the norm of those, and the coefficient; gradients are scaled in place."""
    tape: Tape = []
    norms: list[int] = []
    slots = 0

    def hold(num_bytes: int) -> int:
        nonlocal slots
        tape.append((slots, round_block(num_bytes)))
        slots += 1
        return slots - 1

    for group in by_dtype(params):
        # _foreach_norm (native/cuda/ForeachReduceOp.cu): fp32 partial norms, as many a tensor as the largest needs
        chunks = max(-(-p.numel // CHUNK_ELEMENTS) for p in group)
        partial = hold(4 * len(group) * chunks)
        norms += [hold(group[0].dtype.itemsize) for _ in group]
        tape.append((partial, 0))
    itemsize = 2 if all(p.dtype is params[0].dtype for p in params) and params[0].dtype is not DType.fp32 else 4
    stacked, total = hold(itemsize * len(norms)), hold(itemsize)
    tape += [(stacked, 0), *[(slot, 0) for slot in norms]]
    # max_norm / (total_norm + 1e-6) is reciprocal() * max_norm; then clamp
    sum_, reciprocal, coefficient = hold(itemsize), hold(itemsize), hold(itemsize)
    tape += [(reciprocal, 0), (sum_, 0)]
    clamped = hold(itemsize)
    tape += [(clamped, 0), (coefficient, 0), (total, 0)]
    return tape
