"""DoRA as PEFT 0.21.2 runs it (tuners/lora/dora.py, tuners/lora/variants.py).

The norm of weight + scaling * B @ A is taken anew in every forward. For that the layer makes B @ A by running an
identity matrix [in, in] through the adapter, and casts (or dequantises) the whole weight to the input's dtype: four
tensors of the weight's size and more are alive at once while the layer runs. Backward keeps the base result and the
adapter's result, which the magnitude's gradient needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.ops.autograd import record, result_of
from memplan.ops.embedding import Embedding, embedding
from memplan.ops.int8 import Linear8bitLt
from memplan.ops.linear import Linear, linear
from memplan.ops.lora import BaseLinear, rows_of_transposed
from memplan.ops.pointwise import (
    add,
    add_number,
    clone,
    copied_in_backward,
    dropout,
    mul,
    mul_number,
    same_size_backward,
    to,
)
from memplan.ops.quantized import Linear4bit
from memplan.ops.reduction import reduction_scratch, use_scratch
from memplan.ops.tensor import Parameter, Tensor


@dataclass(slots=True)
class DoraLinear:
    """(magnitude / norm) * (base + scaling * B @ A)(x), written as a sum with base(x); magnitude [out]."""

    base: BaseLinear
    lora_A: Linear
    lora_B: Linear
    magnitude: Parameter
    dropout: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        result = self.base(x)
        if isinstance(self.base, Linear4bit):
            result = clone(result)
        dtype = result.dtype
        converts = isinstance(self.base, Linear) or not x.machine.autocast
        if converts:
            x = to(x, self.lora_A.weight.dtype)
        result = self._variant(x, result)
        return to(result, dtype) if converts else result

    def _variant(self, x: Tensor, result: Tensor) -> Tensor:
        """variants.py `DoraLinearVariant.forward`"""
        base_result: Tensor | None = result
        if self.dropout:
            x = dropout(x, self.dropout)
            base_result = None
        result = add(result, self._extra(x, base_result))
        return result  # noqa: RET504  `base_result` lives until here

    def _extra(self, x: Tensor, base_result: Tensor | None) -> Tensor:
        """dora.py `DoraLinearLayer.forward`"""
        lora_weight = self._lora_weight()
        lora_weight = to(lora_weight, x.dtype)
        weight = self._weight(x)
        weight = to(weight, x.dtype)
        # lora_weight.T, laid out as the weight
        delta = lora_weight.detach().view(*weight.shape)
        weight_norm = norm_of_sum(weight, delta, num_rows=self.lora_B.out_features, rows_last=False)
        scale = divide(self.magnitude, weight_norm)
        lora_result = self.lora_B(self.lora_A(x))
        if base_result is None:
            base_result = linear(x, weight, None, self.lora_B.out_features)
            if self.lora_B.copies_gradient:
                base_result = copied_in_backward(base_result, base_result.shape)
        elif self.base.bias is not None:
            base_result = add(base_result, self.base.bias)
        result = add(mul(add_number(scale), base_result), mul_number(mul(scale, lora_result)))
        return result  # noqa: RET504  the locals live until here

    def _lora_weight(self) -> Tensor:
        weight = self.lora_A.weight
        identity = weight.machine.empty((self.lora_A.in_features, self.lora_A.in_features), weight.dtype)
        result = self.lora_B(self.lora_A(identity))
        return result  # noqa: RET504

    def _weight(self, x: Tensor) -> Tensor:
        """peft/utils/integrations.py `dequantize_module_weight`"""
        if isinstance(self.base, Linear):
            return self.base.weight
        if isinstance(self.base, Linear8bitLt):
            return self.base.dequantise(x.machine)
        return self.base.dequantised(x.machine)

    def parameters(self) -> list[Parameter]:
        return [*self.lora_A.parameters(), *self.lora_B.parameters(), self.magnitude]


@dataclass(slots=True)
class DoraEmbedding:
    """The same for an embedding: dora.py `DoraEmbeddingLayer`; magnitude [width]."""

    base: Embedding
    lora_A: Parameter
    lora_B: Parameter
    magnitude: Parameter

    def __call__(self, batch: tuple[int, ...]) -> Tensor:
        result = embedding(self.base, batch)
        dtype = result.dtype
        scale, extra = self._extra(batch)
        if self.base.embed_scale is not None:
            extra = mul(extra, to(self.base.embed_scale, extra.dtype))
        result = add(mul(scale, result), extra)
        return to(result, dtype)

    def _extra(self, batch: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        m = self.lora_A.machine
        vocab = self.lora_A.shape[1]
        width = self.lora_B.shape[0]
        lora_weight = m.empty((vocab, width), self.lora_A.dtype)  # its graph keeps parameters only
        m.calls("cublas")
        weight_norm = norm_of_sum(self.base.weight.detach(), lora_weight, num_rows=width, rows_last=True)
        scale = divide(self.magnitude, weight_norm)
        after_a = rows_of_transposed(self.lora_A, batch)
        extra = mul_number(mul(scale, linear(after_a, self.lora_B, None, width)))
        return scale, extra

    def parameters(self) -> list[Parameter]:
        return [self.lora_A, self.lora_B, self.magnitude]


def norm_of_sum(weight: Tensor, lora_weight: Tensor, *, num_rows: int, rows_last: bool) -> Tensor:
    """`get_weight_norm`: the norms [num_rows] of weight + scaling * lora_weight; `rows_last` if each row is a column
    in memory."""
    m = weight.machine
    weight = add(weight, mul_number(lora_weight))
    # autocast asks for fp32, for which the kernel reads half precision itself (ReduceOpsUtils.h `make_reduction`)
    dtype = DType.fp32 if m.autocast else weight.dtype
    norm = m.empty((num_rows,), dtype)
    scratch = reduction_scratch(
        weight.numel // num_rows,
        num_rows,
        weight.dtype,
        m.device,
        reduces_last=not rows_last,
        out_dtype=dtype,
        input_vec_size=4,
    )
    use_scratch(m, scratch)
    norm = to(norm, weight.dtype)
    return norm  # noqa: RET504


def divide(magnitude: Parameter, norm: Tensor) -> Tensor:
    """(magnitude / norm).view(1, -1): the norm is kept for the magnitude's gradient."""
    m = norm.machine
    node = record(m, same_size_backward, (magnitude,), (norm,))
    dtype = DType.fp32 if magnitude.dtype is not norm.dtype else norm.dtype
    return result_of(node, m, magnitude.shape, dtype).view(1, *magnitude.shape)
