"""What CUDA does where the CPU build of PyTorch does otherwise, found while comparing with measured steps.

Each entry names its source. Paths are PyTorch's unless they say otherwise.
- attention kernels: sdpa.py; bitsandbytes: bnb.py; in-place gradient sums: tracker.py; autocast: autocast.py.
- dropout: CUDA takes `native_dropout` with a one-byte mask, the CPU a mask of the input's dtype
  (aten/src/ATen/native/Dropout.cpp, `is_fused_kernel_acceptable`).
- layer norm: mean and rstd are fp32 on CUDA, the input's dtype on the CPU
  (aten/src/ATen/native/cuda/layer_norm_kernel.cu).
- softmax: fp16 input to fp32 output is one kernel on CUDA, a cast and a kernel on the CPU and for bf16
  (aten/src/ATen/native/SoftMax.cpp); its backward makes `grad * output` first
  (aten/src/ATen/native/cuda/SoftMax.cu).
- embedding backward over more than 3072 tokens sums sorted segments in fp32
  (aten/src/ATen/native/cuda/Embedding.cu, EmbeddingBackwardKernel.cu).
- index, gather, topk backward write into zeros in place; under a dispatch mode their formulas go out of place
  (torch/csrc/autograd/FunctionsManual.cpp, `areAnyTensorSubclassLike`).
- a boolean index becomes int64 indices first (aten/src/ATen/native/IndexingUtils.h, `expandTensors`).
- grouped_mm takes fp32 and fp16 on CUDA; the fake kernel refuses them (aten/src/ATen/native/cuda/GroupedBlas.cpp).
- foreach norm sums chunks of 65536 first (aten/src/ATen/native/cuda/ForeachReduceOp.cu).
- foreach is what `foreach=None` means on CUDA, a loop on the CPU (torch/optim/optimizer.py): optimizers.py.
- tensors made without a device, or on the literal "cpu", are host memory (AdamW's `step`, opt's layerdrop draw)
  and not counted.
Not modelled: cuBLAS, cuBLASLt and cuDNN workspaces; cub's temporary storage (sort, scan, topk: kilobytes); the
global memory of reductions split over blocks; layer norm's partial sums over more than 65536 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import bitsandbytes  # noqa: F401  (defines torch.ops.bitsandbytes)
import torch

from tests.oracle import autocast, optimizers, sdpa
from tests.oracle.bnb import gemm_4bit
from tests.oracle.tracker import Tracker

aten = torch.ops.aten


def scalar_values(padding: bool) -> Callable[[torch.Tensor], Any]:
    """What `.item()` gives on a fake tensor, by the function that asks: whether a mask is all ones, positions are one
    sequence, tokens count for the loss. Else False (opt drops no layer), and 1 for numbers (an optimizer's step)."""
    answers = {
        "find_packed_sequence_indices": True,
        "_ignore_causal_mask_sdpa": not padding,
        "_ignore_bidirectional_mask_sdpa": not padding,
        "create_recurrent_attention_mask": not padding,
    }

    def scalar_value(tensor: torch.Tensor) -> Any:
        if tensor.dtype != torch.bool:
            return 1.0 if tensor.dtype.is_floating_point else 1
        frame = _asking_frame()
        if frame is not None and frame.f_code.co_name == "compute_loss":  # SFTTrainer's
            return True
        while frame is not None:
            if frame.f_code.co_name in answers:
                return answers[frame.f_code.co_name]
            frame = frame.f_back
        return False

    return scalar_value


def _asking_frame() -> FrameType | None:
    """The innermost frame that is neither torch's nor the tracker's."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(("torch.", "tests.oracle.tracker")):
        frame = frame.f_back
    return frame


# --- scratch: bytes held only while a kernel runs ----------------------------------------------------------
def _scratch_foreach_norm(out: Any, tensors: list[torch.Tensor], *_: Any) -> list[int]:
    """`output_per_tensor`: one fp32 partial sum per chunk (kChunkSize of MultiTensorApply.cuh) of the longest."""
    return [4 * len(tensors) * max(-(-tensor.numel() // 65536) for tensor in tensors)]


def _scratch_softmax_backward(out: Any, grad: torch.Tensor, *_: Any) -> list[int]:
    return [grad.element_size() * grad.numel()]


def _scratch_embedding_backward(
    out: torch.Tensor, grad: torch.Tensor, indices: torch.Tensor, num_weights: int, *_: Any
) -> list[int]:
    num_indices = indices.numel()
    if num_indices <= 3072:
        return []
    num_segments = min(num_indices, num_weights)
    num_partials = num_indices // 10 + num_segments  # NROWS_PER_THREAD
    sort = [8 * num_indices] * 3  # sorted_indices, orig_indices, segment_offsets
    segments = [8, 8 * num_segments, 8 * num_segments, 8, 8 * num_partials]
    return [*sort, *segments, 4 * num_partials * grad.shape[-1]]


def _scratch_index_put(
    out: Any, self: Any, indices: list[torch.Tensor | None], values: Any, accumulate: bool = False
) -> list[int]:
    """`index_put_with_sort_kernel` of Indexing.cu: linear, sorted and original indices, and a range."""
    if not accumulate:
        return []
    num_indices = max(index.numel() for index in indices if index is not None)
    return [8 * num_indices] * 4


SCRATCH: dict[Any, Callable[..., list[int]]] = {
    **sdpa.SCRATCH,
    aten._foreach_norm.Scalar: _scratch_foreach_norm,
    aten._softmax_backward_data.default: _scratch_softmax_backward,
    aten.embedding_dense_backward.default: _scratch_embedding_backward,
    aten.index_put_.default: _scratch_index_put,
}


# --- outputs: replaced results -----------------------------------------------------------------------------
def _fp32_statistics(out: tuple[torch.Tensor, ...], *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
    return out[0], *(torch.empty(item.shape, dtype=torch.float32) for item in out[1:])


OUTPUTS: dict[Any, Callable[..., Any]] = {aten.native_layer_norm.default: _fp32_statistics}


# --- kernels: run in the op's place ------------------------------------------------------------------------
def _in_place_in_backward(in_place: Any) -> Callable[..., torch.Tensor]:
    def kernel(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch._C._current_autograd_node() is None or torch.is_grad_enabled():
            return NotImplemented
        in_place(self, *args, **kwargs)
        return self

    return kernel


def _index(self: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    """A boolean mask becomes the indices of its true entries: all of them here."""
    if not any(index is not None and index.dtype == torch.bool for index in indices):
        return NotImplemented
    expanded: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            nonzero = torch.empty(index.numel(), index.dim(), dtype=torch.int64)
            expanded += nonzero.unbind(1)
        else:
            expanded.append(index)
    return aten.index.Tensor(self, expanded)


def _grouped_mm(
    mat_a: torch.Tensor, mat_b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """Shape and padded row stride of `create_grouped_gemm_output_tensor` (GroupedBlas.cpp), for any float dtype."""
    if mat_a.dim() == 2 and mat_b.dim() == 2:
        shape = (offs.shape[0], mat_a.shape[0], mat_b.shape[1])
    elif mat_a.dim() == 2:
        shape = (mat_a.shape[0], mat_b.shape[-1])
    elif mat_b.dim() == 2:
        shape = (mat_a.shape[1], mat_b.shape[1])
    else:
        shape = (mat_a.shape[0], mat_a.shape[1], mat_b.shape[-1])
    dtype = out_dtype or mat_a.dtype
    alignment = 16 // dtype.itemsize
    row = -(-shape[-1] // alignment) * alignment
    strides = (row, 1) if len(shape) == 2 else (shape[1] * row, row, 1)
    return torch.empty_strided(shape, strides, dtype=dtype)


KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.bitsandbytes.gemm_4bit.default: gemm_4bit,
    aten._grouped_mm.default: _grouped_mm,
    aten.add.Tensor: sdpa.add_mask,
    aten.index.Tensor: _index,
    aten.index_put.default: _in_place_in_backward(aten.index_put_.default),
    aten.scatter_add.default: _in_place_in_backward(aten.scatter_add_.default),
    aten.scatter.src: _in_place_in_backward(aten.scatter_.src),
}


# --- Python-level replacements -----------------------------------------------------------------------------
def _dropout(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if training and 0 < p < 1 and not inplace:
            return aten.native_dropout(input, p, True)[0]
        return real(input, p, training, inplace)

    return dropout


def _softmax(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def softmax(input: torch.Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> torch.Tensor:
        if input.dtype == torch.float16 and dtype == torch.float32:
            return aten._softmax(input, dim, True)
        return real(input, dim, _stacklevel, dtype)

    return softmax


def _on_host_without_device(tracker: Tracker, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") in (None, "cpu"):  # a literal: code for the GPU passes a tensor's device
            with tracker.on_host():
                return real(*args, **kwargs)
        return real(*args, **kwargs)

    return factory


def _to(tracker: Tracker, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Of a host tensor, `to(tensor)` and `to(tensor.device)` are copies on the GPU (states that optimizers make)."""

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], torch.Tensor | torch.device) and tracker.is_on_host(self):
            other = args[0]
            if isinstance(other, torch.device) or not tracker.is_on_host(other):
                dtype = self.dtype if isinstance(other, torch.device) else other.dtype
                return torch.empty_strided(self.size(), self.stride(), dtype=dtype, device=self.device)
        return real(self, *args, **kwargs)

    return to


def _delta_weight(self: Any, adapter: str) -> torch.Tensor:
    """PEFT's `Linear.get_delta_weight` without the casts to fp32 that it makes on a CPU alone (routers' adapters)."""
    product = self.lora_B[adapter].weight @ self.lora_A[adapter].weight
    return (product.T if self.fan_in_fan_out else product) * self.scaling[adapter]


@contextmanager
def emulated(tracker: Tracker, sdpa_first: str) -> Iterator[None]:
    """Everything above that is not a table of the tracker, as long as the context lasts."""
    functional = torch.nn.functional
    real_autocast = torch.is_autocast_enabled
    patches: dict[str, Any] = {
        "torch.nn.functional.scaled_dot_product_attention": sdpa.make(sdpa_first),
        "torch.Tensor.to": _to(tracker, torch.Tensor.to),
        "torch.nn.functional.dropout": _dropout(functional.dropout),
        "torch.nn.functional.softmax": _softmax(functional.softmax),
        "peft.tuners.lora.layer.Linear.get_delta_weight": _delta_weight,
        # PEFT and others ask without naming a device, which means CUDA.
        "torch.is_autocast_enabled": lambda device_type="cpu": real_autocast(device_type),
        # transformers takes fake tensors for a compilation and would skip every check of a mask's values.
        "transformers.utils.import_utils.is_fake_tensor": lambda _: False,
    }
    for name in ("tensor", "rand", "zeros", "ones", "full", "arange"):
        patches[f"torch.{name}"] = _on_host_without_device(tracker, getattr(torch, name))
    with ExitStack() as stack:
        for target, replacement in patches.items():
            stack.enter_context(mock.patch(target, replacement))
        stack.enter_context(autocast.cuda_lists())
        stack.enter_context(optimizers.bitsandbytes_on_gpu(tracker))
        yield
