"""Frozen weights in int8 as bitsandbytes 0.50.2 multiplies them (LLM.int8, threshold 6).

One byte an element and an fp32 scale a row. The input is cast to fp16 and quantised row by row, the product is int32,
then fp16, then the input's dtype (autograd/_functions.py `MatMul8bitLt`, backends/cuda/ops.py). Backward dequantises
the whole weight into the input's dtype.

The input is kept as an attribute of the autograd context, not through `save_for_backward`: no hook of a checkpoint
sees it, and it lives as long as the graph, not until its node has run.

Columns with an outlier are multiplied apart, in the input's dtype, with their rows of the weight dequantised. Backward
needs none of that, yet the context keeps the T x k elements (`ctx.tensors`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    num_outliers: int = 0
    """Columns of the input that hold an outlier."""
    copies_gradient: bool = field(default=False, kw_only=True)
    """As of `Linear`."""

    def __call__(self, x: Tensor) -> Tensor:
        m = x.machine
        inputs = (x,) if self.bias is None else (x, self.bias)
        node = record(m, _backward_8bit, inputs, meta=(self, x.dtype))
        num_rows = x.numel // self.in_features
        codes = _quantise_rows(x, num_rows, self.num_outliers)
        outliers = None
        if self.num_outliers:
            outliers = m.empty((num_rows, self.num_outliers), x.dtype)
            rows_of_weight = self._dequantise_outliers(x)
        if node is not None and x.requires_grad:
            node.kept = x.detach(), outliers, codes[2]
            x.storage.mark("activations")
            if outliers is not None:
                outliers.storage.mark("activations")
        product = m.empty((num_rows, self.out_features), DType.int32)
        result = m.empty((*x.shape[:-1], self.out_features), DType.fp16)
        if x.dtype is not DType.fp16:
            result = m.empty(result.shape, x.dtype)
        del product
        if outliers is not None:
            result = m.empty(result.shape, x.dtype)  # output.addmm(subA, subB)
            m.calls("cublas")
            del rows_of_weight, outliers
        del codes
        return attach(node, result)

    def _dequantise_outliers(self, x: Tensor) -> Tensor:
        """The outliers' columns of the weight, in the input's dtype."""
        m, shape = x.machine, (self.out_features, self.num_outliers)
        codes = m.empty(shape, DType.int8)
        scaled = m.empty(shape, DType.fp32)
        result = m.empty(shape, DType.fp32)
        del scaled, codes
        return result if x.dtype is DType.fp32 else m.empty(shape, x.dtype)

    def dequantise(self, m: Machine) -> Tensor:
        """`int8_vectorwise_dequant`: codes * scales * constant, in fp32."""
        scaled = m.empty((self.out_features, self.in_features), DType.fp32)
        result = m.empty(scaled.shape, DType.fp32)
        del scaled
        return result


def _quantise_rows(x: Tensor, num_rows: int, num_outliers: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """`int8_vectorwise_quant`: scales and codes of the rows, and the numbers of the columns with outliers."""
    m = x.machine
    half = x if x.dtype is DType.fp16 else m.empty(x.shape, DType.fp16)
    scales, codes = m.empty((num_rows,), DType.fp32), m.empty(x.shape, DType.int8)
    magnitudes, outliers = m.empty(x.shape, DType.fp16), m.empty(x.shape, DType.bool8)
    del magnitudes
    found = m.empty((), DType.bool8)
    use_scratch(m, reduction_scratch(x.numel, 1, DType.bool8, m.device, reduces_last=True, partial_bytes=1))
    del found
    columns = m.empty((num_outliers,), DType.int64) if num_outliers else None
    if num_rows > 1:
        zero = m.empty((), DType.int8)  # out_row[:, outlier_cols] = 0
        del zero
    del outliers, half
    return scales, codes, columns


def _backward_8bit(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    layer, dtype = node.meta
    d_x = None
    if node.needs[0]:
        # grad_output.reshape(-1, out_features).contiguous() (autograd/_functions.py)
        dense = m.empty(grad.shape, grad.dtype) if layer.copies_gradient else None
        weight = m.empty((layer.out_features, layer.in_features), dtype)
        scale = m.empty((layer.out_features,), DType.fp32)
        del scale
        d_x = m.empty((*grad.shape[:-1], layer.in_features), dtype)
        d_x.is_reshaped = True
        m.calls("cublas")
        del weight, dense
    return (d_x,) if len(node.needs) == 1 else (d_x, grad if node.needs[1] else None)
