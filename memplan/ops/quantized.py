"""Frozen quantised weights as bitsandbytes stores and multiplies them (bitsandbytes 0.50.2).

4 bit (functional.py `quantize_4bit`): n/2 bytes of codes, one fp32 absmax per block of 64, a table of 16 fp32;
with double quantisation (`compress_statistics`) the absmax is one byte, with an fp32 absmax per 256 of those, a
table of 256 fp32 and an fp32 offset. Nothing of the input is saved (autograd/_functions.py `MatMul4Bit`); forward
and backward each dequantise the whole weight into a temporary (backends/cuda/ops.py `gemm_4bit`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, record, result_of
from memplan.ops.pointwise import GradList, incoming, to
from memplan.ops.tensor import EXTERNAL, Machine, Parameter, Storage, Tensor

BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256


def storage_bytes_4bit(num_elements: int, *, double_quant: bool) -> list[int]:
    """Bytes of each tensor that holds one 4-bit weight, in the order in which they come to stay."""
    blocks = -(-num_elements // BLOCK_SIZE)
    codes, table = (num_elements + 1) // 2, 16 * 4
    if not double_quant:
        return [blocks * 4, codes, table]
    nested = -(-blocks // NESTED_BLOCK_SIZE)
    return [codes, table, 4, 256 * 4, nested * 4, blocks]


def dequantises(num_rows: int, out_features: int, in_features: int, *, num_sms: int = 132) -> bool:
    """Whether a product of `num_rows` tokens goes through a dequantised copy of the weight.

    On Hopper the fused kernel is taken for few rows or a small wide weight:
    bitsandbytes 0.50.2 backends/cuda/ops.py `_gemm_4bit_use_custom_cuda`, the branch of compute capability 9.
    """
    if in_features % BLOCK_SIZE:
        return True
    blocks = (out_features + 63) // 64
    if out_features * in_features < 4 * 1024 * 1024:
        if in_features * 2 < out_features:
            return num_rows > (512 if blocks * 3 < num_sms else 320)
        return num_rows > (32 if blocks * 4 <= num_sms else 16 if blocks * 2 <= num_sms else 4)
    if blocks >= num_sms:
        return num_rows > (64 if blocks >= num_sms * 3 else 48 if blocks >= num_sms * 2 else 32)
    return num_rows > 16


@dataclass(slots=True)
class Linear4bit:
    """bnb.nn.Linear4bit: a frozen weight [out, in] in 4 bit, an optional bias [out]."""

    in_features: int
    out_features: int
    double_quant: bool
    compute_dtype: DType = DType.bf16
    bias: Parameter | None = None
    loaded_dtype: DType = DType.bf16
    """What it was quantised from, and what `dequantize_4bit` gives back (`quant_state.dtype`)."""
    copies_gradient: bool = field(default=False, kw_only=True)
    """As of `Linear`."""

    def __call__(self, x: Tensor) -> Tensor:
        """nn/modules.py `Linear4bit.forward`: input cast to the compute dtype, result cast back."""
        dtype = x.dtype
        x = to(x, self.compute_dtype)
        bias = None if self.bias is None else to(self.bias, self.compute_dtype)
        return to(self.product(x, bias), dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        m = x.machine
        num_rows = x.numel // self.in_features
        inputs = (x,) if bias is None else (x, bias)
        node = record(m, _backward_4bit, inputs, meta=self)
        weight = self.dequantise(x) if dequantises(num_rows, self.out_features, self.in_features) else None
        result = result_of(node, m, (*x.shape[:-1], self.out_features), x.dtype)
        if weight is not None:
            m.calls("cublas")
            if bias is not None:
                m.calls("cublaslt")
        del weight
        return result

    def dequantise(self, x: Tensor, *, fused: bool = True) -> tuple[Tensor, ...]:
        """The weight in `x`'s dtype, with the fp32 absmax that its dequantisation works from.

        `fused` is the forward's `_dequant_linear_fallback`, which adds the offset into a second tensor;
        `dequantize_4bit` (functional.py), which backward calls, adds it in place.
        """
        m = x.machine
        num_elements = self.in_features * self.out_features
        shape = (self.out_features, self.in_features)
        if not self.double_quant:
            return (m.empty(shape, x.dtype),)
        blocks = (-(-num_elements // BLOCK_SIZE),)
        absmax = m.empty(blocks, DType.fp32)
        if fused:
            return absmax, m.empty(blocks, DType.fp32), m.empty(shape, x.dtype)
        return absmax, m.empty(shape, x.dtype)

    def dequantised(self, m: Machine) -> Tensor:
        """`dequantize_4bit`: the weight in the dtype it was quantised from."""
        like = Tensor(Storage(m, 0, slot=EXTERNAL), (), self.loaded_dtype)
        return self.dequantise(like, fused=False)[-1]  # the absmax dies in dequantize_4bit


def _backward_4bit(node: Node, grads: GradList) -> Grads:
    grad, layer = incoming(grads), node.meta
    d_x = None
    if node.needs[0]:
        weight = to(layer.dequantised(node.machine), grad.dtype)
        dense = node.machine.empty(grad.shape, grad.dtype) if layer.copies_gradient else None
        d_x = node.machine.empty((*grad.shape[:-1], layer.in_features), grad.dtype)
        del dense
        node.machine.calls("cublas")
        del weight
    return (d_x,) if len(node.needs) == 1 else (d_x, grad if node.needs[1] else None)
