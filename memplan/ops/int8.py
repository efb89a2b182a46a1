"""Frozen weights in int8 as bitsandbytes 0.50.2 multiplies them (LLM.int8, threshold 6).

One byte an element and an fp32 scale a row. The input is cast to fp16 and quantised row by row, the product is int32,
then fp16, then the input's dtype (autograd/_functions.py `MatMul8bitLt`, backends/cuda/ops.py). Backward dequantises
the whole weight into the input's dtype.

The input is kept as an attribute of the autograd context, not through `save_for_backward`: no hook of a checkpoint
sees it, and it lives as long as the graph, not until its node has run.

Columns with outliers are data: none are counted here. With k of them, backward keeps T x k more.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, attach, record
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.reduction import reduction_scratch, use_scratch
from memplan.ops.tensor import Machine, Parameter, Tensor


def storage_bytes_int8(out_features: int, in_features: int) -> list[int]:
    """Bytes of each tensor that holds one int8 weight, in the order in which they come to stay."""
    return [out_features * 4, out_features * in_features]


@dataclass(slots=True)
class Linear8bitLt:
    """bnb.nn.Linear8bitLt: a frozen weight [out, in] in int8, an optional bias [out]."""

    in_features: int
    out_features: int
    bias: Parameter | None = None

    def __call__(self, x: Tensor) -> Tensor:
        m = x.machine
        inputs = (x,) if self.bias is None else (x, self.bias)
        node = record(m, _backward_8bit, inputs, meta=(self, x.dtype))
        if node is not None and x.requires_grad:
            node.kept = x.detach()
            x.storage.mark("activations")
        num_rows = x.numel // self.in_features
        codes = _quantise_rows(x, num_rows)
        product = m.empty((num_rows, self.out_features), DType.int32)
        result = m.empty((*x.shape[:-1], self.out_features), DType.fp16)
        if x.dtype is not DType.fp16:
            result = m.empty(result.shape, x.dtype)
        del product, codes
        return attach(node, result)

    def dequantise(self, m: Machine) -> Tensor:
        """`int8_vectorwise_dequant`: codes * scales * constant, in fp32."""
        scaled = m.empty((self.out_features, self.in_features), DType.fp32)
        result = m.empty(scaled.shape, DType.fp32)
        del scaled
        return result


def _quantise_rows(x: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """`int8_vectorwise_quant`: scales and codes of the rows; and a look for outliers."""
    m = x.machine
    half = x if x.dtype is DType.fp16 else m.empty(x.shape, DType.fp16)
    scales, codes = m.empty((num_rows,), DType.fp32), m.empty(x.shape, DType.int8)
    magnitudes, outliers = m.empty(x.shape, DType.fp16), m.empty(x.shape, DType.bool8)
    del magnitudes
    found = m.empty((), DType.bool8)
    use_scratch(m, reduction_scratch(x.numel, 1, DType.bool8, m.device, reduces_last=True, partial_bytes=1))
    del found
    if num_rows > 1:
        zero = m.empty((), DType.int8)  # out_row[:, outlier_cols] = 0
        del zero
    del outliers, half
    return scales, codes


def _backward_8bit(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    layer, dtype = node.meta
    d_x = None
    if node.needs[0]:
        weight = m.empty((layer.out_features, layer.in_features), dtype)
        scale = m.empty((layer.out_features,), DType.fp32)
        del scale
        d_x = m.empty((*grad.shape[:-1], layer.in_features), dtype)
        d_x.is_reshaped = True
        m.calls("cublas")
        del weight
    return (d_x,) if len(node.needs) == 1 else (d_x, grad if node.needs[1] else None)
