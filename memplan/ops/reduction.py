"""What a CUDA reduction (sum, mean, norm) asks the allocator for while it runs, beside its result.

A reduction with few outputs and many inputs an output is split over thread blocks, which meet in a buffer:
torch 2.11 aten/src/ATen/native/cuda/Reduce.cuh `setReduceConfig`, `ReduceConfig::global_memory_size`. Sum and mean
load 8 values of a 16-bit type at a time, everything else 4 (ReduceSumProdKernel.cu, ReduceMomentKernel.cu).
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.ops.device import Device
from memplan.ops.tensor import Machine

MAX_THREADS = 512  # mnt_wrapper
WARP_SIZE = 32
MIN_VALUES_PER_THREAD, MAX_VALUES_PER_THREAD = 16, 256
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Scratch:
    """Bytes that one reduction holds: `accumulator` throughout, each of `passes` (buffer, semaphores) in turn."""

    accumulator: int
    passes: tuple[tuple[int, int], ...]


def reduction_scratch(
    num_reduced: int,
    num_kept: int,
    dtype: DType,
    device: Device,
    *,
    reduces_last: bool,
    out_dtype: DType | None = None,
    input_vec_size: int | None = None,
    partial_bytes: int = 4,
) -> Scratch:
    """The buffers of a reduction of `num_reduced` values into each of `num_kept`, over a contiguous tensor.

    `reduces_last` says that neighbours in memory are summed (dim=-1, or all of the tensor), and not rows;
    `partial_bytes` is the size of a partial result (1 for `any`).
    """
    if not device.is_cuda:
        return Scratch(0, ())
    out_dtype = out_dtype or dtype
    vec = input_vec_size or (8 if dtype.itemsize == 2 else 4)
    parts = _parts(num_reduced, num_kept, dtype.itemsize, reduces_last)
    # gpu_reduce_kernel: a half result cannot take the partial sums of a tensor that is reduced in parts
    apart = len(parts) > 1 and dtype.is_half and out_dtype is dtype
    passes = [_pass(reduced, kept, vec, device, reduces_last) for reduced, kept in parts]
    found = [(buffer * partial_bytes, semaphores) for buffer, semaphores in filter(None, passes)]
    return Scratch(num_kept * partial_bytes if apart else 0, tuple(found))


def use_scratch(machine: Machine, scratch: Scratch) -> None:
    """Allocates and frees the buffers of `scratch`."""
    accumulator = machine.workspace(scratch.accumulator) if scratch.accumulator else None
    for buffer_bytes, semaphore_bytes in scratch.passes:
        buffer = machine.workspace(buffer_bytes)
        semaphores = machine.workspace(semaphore_bytes)
        del semaphores, buffer
    del accumulator


def _parts(num_reduced: int, num_kept: int, itemsize: int, reduces_last: bool) -> list[tuple[int, int]]:
    """Halves of the longer stride until 32 bits index each (TensorIterator.cpp `SplitUntil32Bit`)."""
    row = num_reduced if reduces_last else num_kept
    reduced_extent = (num_reduced - 1) * itemsize * (1 if reduces_last else row)
    kept_extent = (num_kept - 1) * itemsize * (row if reduces_last else 1)
    if num_reduced * num_kept <= _MAX_INT32 and 1 + reduced_extent + kept_extent <= _MAX_INT32:
        return [(num_reduced, num_kept)]
    if reduced_extent >= kept_extent:
        # The halves keep the row's stride, which the extents above take from the whole row.
        half = num_reduced // 2
        return _parts(half, num_kept, itemsize, reduces_last) + _parts(
            num_reduced - half, num_kept, itemsize, reduces_last
        )
    half = num_kept // 2
    return _parts(num_reduced, half, itemsize, reduces_last) + _parts(
        num_reduced, num_kept - half, itemsize, reduces_last
    )


def _pass(
    num_inputs: int, num_outputs: int, input_vec_size: int, device: Device, reduces_last: bool
) -> tuple[int, int] | None:
    """`setReduceConfig` for one 32-bit part: partial results in the buffer and bytes of the semaphores, or None."""
    output_vec = 1
    if reduces_last:
        width_bound, height_bound = num_inputs, num_outputs
        if width_bound >= 128:
            width_bound //= input_vec_size
    else:
        output_vec = next(v for v in (4, 2, 1) if num_outputs % v == 0)
        width_bound, height_bound = num_outputs // output_vec, num_inputs
    width, height = _block(width_bound, height_bound, MAX_THREADS // output_vec)
    step_input = width if reduces_last else 1
    step_output = 1 if reduces_last else width
    if -(-num_inputs // step_input) < min(height * 16, MAX_VALUES_PER_THREAD):
        return None  # no split over warps, hence none over blocks
    step_input *= height
    values = -(-num_inputs // step_input)
    target = device.num_sms * (device.max_threads_per_sm // (width * height))
    grid = -(-(num_outputs // output_vec) // step_output)
    if values < MAX_VALUES_PER_THREAD or grid > target:
        return None
    blocks = max(min(-(-target // grid), -(-values // MIN_VALUES_PER_THREAD)), -(-values // MAX_VALUES_PER_THREAD))
    if blocks <= 1:
        return None
    buffer = num_outputs * blocks
    return (buffer if reduces_last else buffer * width * output_vec), 4 * grid


def _block(width_bound: int, height_bound: int, max_threads: int) -> tuple[int, int]:
    """`set_block_dimension`: threads along x and y."""
    width = _last_pow2(width_bound) if width_bound < max_threads else max_threads
    height = _last_pow2(height_bound) if height_bound < max_threads else max_threads
    rows = min(height, max_threads // min(width, WARP_SIZE))
    return min(width, max_threads // rows), rows


def _last_pow2(n: int) -> int:
    return max(1, 1 << (n.bit_length() - 1)) if n > 0 else 1
