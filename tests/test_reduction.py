"""Staging buffers of CUDA reductions against those in the allocation traces of an H200 (torch 2.11)."""

from __future__ import annotations

import pytest

from memplan.dtypes import DType
from memplan.ops.device import FAKE_CPU, HOPPER
from memplan.ops.reduction import reduction_scratch, use_scratch
from memplan.ops.tensor import Machine

ROWS, LAST = False, True

# Values summed, results, dtype, what is summed, and (buffer, semaphores) as traced; the comment names the operator.
TRACED = [
    (1024, 1024, DType.bf16, ROWS, (8388608, 32)),  # gradient of a norm's weight, 2 x 512 tokens
    (1024, 4096, DType.bf16, ROWS, (33554432, 128)),  # gradient of a bias
    (1024, 8000, DType.bf16, ROWS, (65536000, 252)),  # gradient of the head's bias, 8000 words
    (8000, 1024, DType.fp32, ROWS, (65536000, 32)),  # Adafactor: update.mean(dim=-2)
    (2816, 1024, DType.fp32, ROWS, (23068672, 32)),
    (1024, 2816, DType.fp32, ROWS, (23068672, 88)),
    (256, 1024, DType.fp32, ROWS, None),
    (1024, 8000, DType.fp32, LAST, None),  # update.mean(dim=-1)
    (8192000, 1, DType.fp32, LAST, (2112, 4)),  # tensor.norm(2)
    (2883584, 1, DType.fp32, LAST, (1408, 4)),
    (1048576, 1, DType.fp32, LAST, (512, 4)),
    (262144, 1, DType.fp32, LAST, (128, 4)),
]


@pytest.mark.parametrize(("num_reduced", "num_kept", "dtype", "last", "traced"), TRACED)
def test_the_buffers_are_those_that_an_h200_asked_for(
    num_reduced: int, num_kept: int, dtype: DType, last: bool, traced: tuple[int, int] | None
) -> None:
    scratch = reduction_scratch(num_reduced, num_kept, dtype, HOPPER, reduces_last=last)
    assert scratch.passes == (() if traced is None else (traced,))
    assert scratch.accumulator == 0


def test_beyond_32_bit_indexing_the_parts_run_one_after_another() -> None:
    """2 GiB of fp32 are the most that one launch indexes (TensorIterator::can_use_32bit_indexing)."""
    fits = reduction_scratch(2**29 - 1024, 1, DType.fp32, HOPPER, reduces_last=True)
    halved = reduction_scratch(2**29 + 1024, 1, DType.fp32, HOPPER, reduces_last=True)
    assert (len(fits.passes), len(halved.passes)) == (1, 2)
    assert halved.accumulator == 0
    # bf16 cannot hold the partial sums of the parts
    sums = reduction_scratch(2**20, 2048, DType.bf16, HOPPER, reduces_last=False)
    assert sums.accumulator == 4 * 2048


def test_the_cpu_asks_for_none_and_a_machine_gives_back_what_it_lent() -> None:
    scratch = reduction_scratch(8000, 1024, DType.fp32, FAKE_CPU, reduces_last=False)
    assert scratch.passes == ()
    machine = Machine()
    use_scratch(machine, reduction_scratch(8000, 1024, DType.fp32, HOPPER, reduces_last=False))
    sizes = [size for _, size in machine.new_tape()]
    assert sizes == [65536000, 512, 0, 0]
