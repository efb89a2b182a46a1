"""bitsandbytes 4-bit linears without a GPU: the real modules over hand-built states, the CUDA kernels' allocations.

`quantize_4bit` needs data, so each `QuantState` is written out as it would be (bitsandbytes/functional.py
`quantize_4bit`, `quantize_blockwise`). `gemm_4bit` runs what the CUDA backend runs
(bitsandbytes/backends/cuda/ops.py): its own dispatch decides between the fused kernel and
dequantise + linear.
"""

from __future__ import annotations

import functools
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

BLOCK_SIZE = 64  # quantize_4bit's default
NESTED_BLOCK_SIZE = 256  # quantize_4bit: `quantize_blockwise(..., blocksize=256)`
H200_PROPS = (132, 9, 0)  # SMs, compute capability: what the dispatch asks of the GPU

# What the user has to name in `llm_int8_skip_modules`, in place of what transformers leaves out by itself: gemma3n
# clamps the weights of two linears while it trains, which fails for quantised ones.
SKIPPED_MODULES = {"gemma3n_text": ["lm_head", "prediction_coefs", "correction_coefs"]}


def quantize(model: nn.Module, *, double_quant: bool, compute_dtype: torch.dtype) -> None:
    """Replace the linears as transformers' 4-bit quantizer does (its own functions), on meta."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    before = dict(model.named_modules())
    replaced = 0
    skipped = SKIPPED_MODULES.get(model.config.model_type)
    replace_with_bnb_linear(model, get_keys_to_not_convert(model) if skipped is None else skipped, config)
    for name, module in model.named_modules():
        if module is not before[name]:
            replaced += 1
            if module.bias is not None:
                module.bias = nn.Parameter(before[name].bias.data, requires_grad=False)
            module.weight = _packed(before[name].weight, module, double_quant)
    if double_quant and replaced:  # falcon's own linears are not
        # `name2qmap["dynamic"]`: quantize_blockwise keeps the code table it copied for each layer.
        model._bnb_dynamic_map = torch.empty(256, device="meta")
    model.is_loaded_in_4bit = True
    model.is_quantized = True


def _packed(weight: torch.Tensor, module: nn.Module, double_quant: bool) -> nn.Parameter:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    # A Conv1D's weight is stored transposed; it is quantised as a linear's.
    shape = torch.Size((module.out_features, module.in_features))
    num_blocks = -(-shape.numel() // BLOCK_SIZE)
    empty = functools.partial(torch.empty, device="meta")
    nested = {}
    if double_quant:
        nested = {
            "offset": empty((), dtype=torch.float32),
            "state2": QuantState(
                absmax=empty(-(-num_blocks // NESTED_BLOCK_SIZE), dtype=torch.float32),
                code=empty(256, dtype=torch.float32),
                blocksize=NESTED_BLOCK_SIZE,
                dtype=torch.float32,
            ),
        }
    state = QuantState(
        absmax=empty(num_blocks, dtype=torch.uint8 if double_quant else torch.float32),
        shape=shape,
        dtype=weight.dtype,
        blocksize=BLOCK_SIZE,
        code=empty(16, dtype=torch.float32),
        quant_type="nf4",
        **nested,
    )
    data = empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8)
    return Params4bit(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK_SIZE,
        compress_statistics=double_quant,
        quant_type="nf4",
        module=module,
        bnb_quantized=True,
    )


def state_tensors(state: Any) -> list[tuple[Any, str]]:
    """(holder, attribute) of each tensor of a QuantState."""
    slots = [(state, "absmax"), (state, "code")]
    if state.nested:
        slots += [(state, "offset"), (state.state2, "absmax"), (state.state2, "code")]
    return slots


@functools.cache
def _cuda_backend() -> ModuleType:
    """bitsandbytes' CUDA backend, imported over a stand-in for its compiled library."""

    class Library:
        def __getattr__(self, _: str) -> SimpleNamespace:
            return SimpleNamespace()

    import bitsandbytes.cextension

    with (
        mock.patch.object(bitsandbytes.cextension, "lib", Library()),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", None, create=True),
    ):
        import bitsandbytes.backends.cuda.ops as ops
    ops._gpu_dispatch_props = lambda _: H200_PROPS
    # The kernels proper write into tensors that their callers made: nothing is allocated there.
    ops._dequantize_blockwise_impl = lambda *_, **__: None
    ops._dequantize_4bit_impl = lambda *_, **__: None
    return ops


def gemm_4bit(A: torch.Tensor, B: torch.Tensor, shapeB: list[int], *args: Any, **kwargs: Any) -> torch.Tensor:
    """The body of the CUDA kernel of `bitsandbytes::gemm_4bit`."""
    ops = _cuda_backend()
    blocksize = args[1]
    num_rows, (out_features, in_features) = A.numel() // A.shape[-1], shapeB
    fused = (
        num_rows <= ops._gemm_4bit_custom_max_m
        and in_features % blocksize == 0
        and ops._gemm_4bit_use_custom_fn(0, A.dtype, num_rows, out_features, in_features)
    )
    if fused:
        A = A.contiguous()
        return torch.empty((*A.shape[:-1], out_features), dtype=A.dtype)
    return ops._dequant_linear_fallback(A, B, shapeB, *args, **kwargs)
