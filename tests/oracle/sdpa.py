"""`scaled_dot_product_attention` as CUDA would run it, on fake CPU tensors.

Which kernel runs (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp): on Hopper and data-centre Blackwell with
cuDNN above 9.15.0, which the torch 2.11+cu130 wheels bring (9.19), the order is cuDNN, flash, memory-efficient, math;
elsewhere flash comes first. `first` says which of the two worlds is meant.
- cuDNN: half precision, head dims of at most 256 (128 elsewhere than on sm90), multiples of 8; masks and GQA.
- flash: half precision, no mask, equal head dims up to 256 (padded to a multiple of 8); GQA is fine.
- memory-efficient: any float, masks; no GQA; head dims aligned to 16 bytes. fp32 training lands here.
- math: whatever is left; decomposed, so its intermediates are traced.

The op is called below `scaled_dot_product_attention`, so saved tensors and backward outputs are those of its own
derivative. `scratch_*` are the buffers each kernel holds only while it runs, read from flash_attn/flash_api.cpp,
attention_backward.cu and mem_eff_attention/kernel_backward.h. cuDNN's workspace is decided inside cuDNN: not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from tests.oracle.autocast import without_autocast

aten = torch.ops.aten

NUM_SMS = 132  # H100/H200 SXM: decides flash's split-KV
HOST_OUTPUTS = {aten._scaled_dot_product_efficient_attention.default: (2, 3)}
"""The dropout's seed and offset, outside of a stream capture (Note [Seed and Offset Device] of attention.cu)."""


def choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    enable_gqa: bool,
    first: str,
) -> str:
    """The backend's name; see the module docstring."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    dim, value_dim = query.shape[-1], value.shape[-1]
    square = not is_causal or query.shape[-2] == key.shape[-2]
    same_heads = query.shape[1] == key.shape[1]
    if not same_heads and not enable_gqa:  # `check_batch_size_and_num_heads_dense`: falcon's one key head, broadcast
        return "math"
    cudnn = first == "cudnn" and half and max(dim, value_dim) <= 256 and dim % 8 == 0 and value_dim % 8 == 0
    if cudnn and key.shape[-2] > 1:
        return "cudnn"
    if half and mask is None and dim == value_dim <= 256 and square:
        return "flash"
    alignment = 16 // query.element_size()
    if same_heads and not enable_gqa and dim % alignment == 0 and value_dim % alignment == 0:
        return "efficient"
    return "math"


def make(first: str) -> Callable[..., torch.Tensor]:
    """A stand-in for `torch.nn.functional.scaled_dot_product_attention`."""

    def scaled_dot_product_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            # The op is on autocast's lower-precision list (aten/src/ATen/autocast_mode.h).
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if attn_mask is not None and attn_mask.dtype == torch.float32:
                attn_mask = attn_mask.to(dtype)
        with without_autocast():
            return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, first)

    return scaled_dot_product_attention


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    first: str,
) -> torch.Tensor:
    kernel = choose(query, key, value, attn_mask, is_causal, enable_gqa, first)
    if kernel == "math":
        with _by_ops():
            return aten._scaled_dot_product_attention_math(
                query,
                key,
                value,
                _additive(attn_mask, query),
                dropout_p,
                is_causal,
                None,
                scale=scale,
                enable_gqa=enable_gqa,
            )[0]
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            query,
            key,
            value,
            _additive(attn_mask, query),
            _any_grad(query, key, value),
            dropout_p,
            is_causal,
            False,
            scale=scale,
        )[0]
    if kernel == "efficient":
        return aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            _efficient_bias(attn_mask, query, key),
            _any_grad(query, key, value),
            dropout_p,
            is_causal,
            scale=scale,
        )[0]
    dim = query.shape[-1]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    if dim % 8:
        pad = (0, 8 - dim % 8)
        query, key, value = (torch.nn.functional.pad(tensor, pad) for tensor in (query, key, value))
    out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    return out[..., :dim] if dim % 8 else out


_is_math = ContextVar("is_math", default=False)


@contextmanager
def _by_ops() -> Iterator[None]:
    token = _is_math.set(True)
    try:
        yield
    finally:
        _is_math.reset(token)


def add_mask(scores: torch.Tensor, mask: torch.Tensor, **_: Any) -> torch.Tensor:
    """`attn.add_(*attn_mask)` of `_scaled_dot_product_attention_math`, out of place under a dispatch mode."""
    return scores.detach() if _is_math.get() else NotImplemented


def _any_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """`convert_boolean_attn_mask` of aten/src/ATen/native/transformers/attention.cpp."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.scalar_tensor(-math.inf, dtype=query.dtype, device=mask.device))


def _efficient_bias(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """`preprocess_mask` of the same file: rows padded to a multiple of 8, then a view of full shape."""
    bias = _additive(mask, query)
    if bias is None:
        return None
    width = bias.shape[-1]
    if width % 8:
        bias = torch.nn.functional.pad(bias, (0, 8 - width % 8))[..., :width]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


# --- scratch ------------------------------------------------------------------------------------------------------
def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _num_splits(num_blocks_m: int, num_blocks_n: int) -> int:
    """`num_splits_heuristic` of flash_api.cpp, over twice the SMs."""
    num_sms = 2 * NUM_SMS
    if num_blocks_m >= 0.8 * num_sms:
        return 1
    limit = min(128, num_sms, num_blocks_n)

    def eligible(splits: int) -> bool:
        return splits == 1 or -(-num_blocks_n // splits) != -(-num_blocks_n // (splits - 1))

    waves = {splits: num_blocks_m * splits / num_sms for splits in range(1, limit + 1) if eligible(splits)}
    efficiency = {splits: wave / math.ceil(wave) for splits, wave in waves.items()}
    best = max(efficiency.values())
    return next(splits for splits in sorted(efficiency) if efficiency[splits] >= 0.85 * best)


def scratch_flash(
    out: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **_: Any
) -> list[int]:
    """Split-KV's partial outputs (`set_params_splitkv`): only where the batch leaves SMs idle."""
    batch, heads, length, dim = query.shape
    if args and args[0]:  # dropout: no split-KV
        return []
    block_n = 256 if dim <= 64 else 128 if dim <= 128 else 64
    splits = _num_splits(batch * heads * -(-length // 64), -(-key.shape[2] // block_n))
    if splits == 1:
        return []
    rows = splits * batch * heads * length
    return [4 * rows, 4 * rows * _round_up(dim, 32 if dim <= 128 else 64)]


def scratch_flash_backward(
    out: Any, grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> list[int]:
    """`mha_bwd`: softmax_d and dq_accum in fp32; dk, dv of every query head for GQA; a contiguous dO if it was not."""
    batch, heads, length, dim = query.shape
    rows = batch * heads * _round_up(length, 128)
    sizes = [4 * rows, 4 * rows * _round_up(dim, 32 if dim <= 128 else 64)]
    if key.shape[1] != heads:
        sizes += [key.element_size() * batch * heads * key.shape[2] * dim] * 2
    if not grad_out.transpose(1, 2).is_contiguous():
        sizes.insert(0, grad_out.element_size() * grad_out.numel())
    return sizes


def scratch_efficient(
    out: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> list[int]:
    """Half precision with value heads wider than 128 accumulates in fp32 (`kNeedsOutputAccumulatorBuffer`)."""
    if query.element_size() == 4 or value.shape[-1] <= 128:
        return []
    return [4 * query.numel() // query.shape[-1] * value.shape[-1]]


def scratch_efficient_backward(
    out: Any, grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> list[int]:
    """`delta` (in fp32 with the product it is summed from, gone with that statement), then the accumulators of
    `workspace_size()`."""
    batch, heads, length, dim = query.shape
    keys, value_dim = key.shape[2], value.shape[-1]
    half, widest = query.element_size() == 2, max(dim, value_dim)
    # The kernels that dispatch_cutlassB_* offers compute capability 9.0, in its order.
    block_i, block_j, max_dim = (64, 64, 64) if widest <= 64 else (128, 128 if half else 64, 128)
    if widest > 128:
        block_i, block_j, max_dim = 128, 64, 65536
    accumulates_keys = half and not (half and max_dim <= block_i)
    splits = -(-keys // block_j)
    if batch * heads >= 256 and keys <= 2 * block_j:
        splits = 1
    if accumulates_keys:
        splits = min(splits, 200 // (batch * heads))
    splits = max(splits, 1)
    elements = -(-length // block_i) * -(-dim // block_j) * (16 + 4 * block_i * block_j) // 4
    if accumulates_keys:
        elements += splits * block_j * (_round_up(dim, block_i) + _round_up(value_dim, block_i))
    delta = 4 * batch * heads * length
    product = 4 * grad_out.numel()
    sizes = [delta] if half else [product, delta, delta, -delta, -product]
    if not grad_out.transpose(1, 2).is_contiguous():
        sizes.insert(0, grad_out.element_size() * grad_out.numel())
    return [*sizes, 4 * batch * heads * _round_up(elements, 4)]


SCRATCH: dict[Any, Callable[..., list[int]]] = {
    aten._scaled_dot_product_flash_attention.default: scratch_flash,
    aten._scaled_dot_product_flash_attention_backward.default: scratch_flash_backward,
    aten._scaled_dot_product_efficient_attention.default: scratch_efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: scratch_efficient_backward,
}
