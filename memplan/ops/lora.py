"""A LoRA adapter around a layer, as PEFT 0.21.2 runs it.

tuners/lora/layer.py `Linear.forward`, `Embedding.forward`, tuners/lora/bnb.py: the adapter casts the layer's input to
its own dtype, so that each adapted layer keeps its own copy of the input when the dtypes differ, also where
neighbours share that input; `lora_A`'s output is kept for `lora_B`. rsLoRA changes the scaling alone, no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.ops.autograd import Grads, Node, record, result_of
from memplan.ops.embedding import Embedding, embedding
from memplan.ops.int8 import Linear8bitLt
from memplan.ops.linear import Linear, linear
from memplan.ops.pointwise import GradList, add, clone, dropout, incoming, mul, mul_number, to
from memplan.ops.quantized import Linear4bit
from memplan.ops.tensor import Parameter, Tensor

BaseLinear = Linear | Linear4bit | Linear8bitLt


@dataclass(slots=True)
class LoraLinear:
    """base(x) + lora_B(lora_A(dropout(x))) * scaling."""

    base: BaseLinear
    lora_A: Linear
    lora_B: Linear
    dropout: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(self.base, Linear):
            return self._on_quantized(x)
        result = self.base(x)
        dtype = result.dtype
        x = to(x, self.lora_A.weight.dtype)
        result = add(result, mul_number(self._adapt(x)))
        return to(result, dtype)

    def _on_quantized(self, x: Tensor) -> Tensor:
        result = self.base(x)
        if isinstance(self.base, Linear4bit):
            result = clone(result)
        if x.machine.autocast:
            return add(result, mul_number(self._adapt(x)))
        dtype = result.dtype
        x = to(x, self.lora_A.weight.dtype)
        output = mul_number(self._adapt(x))
        output = to(output, dtype)
        return add(result, output)

    def _adapt(self, x: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(dropout(x, self.dropout) if self.dropout else x))

    def parameters(self) -> list[Parameter]:
        return [*self.lora_A.parameters(), *self.lora_B.parameters()]


@dataclass(slots=True)
class LoraEmbedding:
    """base(ids) + (lora_embedding_A.T[ids] @ lora_embedding_B.T) * scaling; A is [rank, vocab], B [width, rank]."""

    base: Embedding
    lora_A: Parameter
    lora_B: Parameter

    def __call__(self, batch: tuple[int, ...]) -> Tensor:
        result = embedding(self.base, batch)
        dtype = result.dtype
        after_a = rows_of_transposed(self.lora_A, batch)
        output = mul_number(linear(after_a, self.lora_B, None, self.lora_B.shape[0]))
        if self.base.embed_scale is not None:
            output = mul(output, to(self.base.embed_scale, output.dtype))
        result = add(result, output)
        return to(result, dtype)

    def parameters(self) -> list[Parameter]:
        return [self.lora_A, self.lora_B]


def rows_of_transposed(weight: Parameter, batch: tuple[int, ...]) -> Tensor:
    """F.embedding(ids, weight.T) of a weight [rank, vocab]."""
    m = weight.machine
    node = record(m, _rows_backward, (weight,), meta=weight)
    return result_of(node, m, (*batch, weight.shape[0]), weight.dtype)


def _rows_backward(node: Node, grads: GradList) -> Grads:
    """The gradient comes out transposed: a first one is copied into the weight's layout (accumulate_grad.h)."""
    weight, grad = node.meta, incoming(grads)
    d_weight = node.machine.empty(weight.shape, grad.dtype)
    if weight.grad is not None:
        return (d_weight,)
    laid_out = node.machine.empty(weight.shape, grad.dtype)
    del d_weight
    return (laid_out,)
