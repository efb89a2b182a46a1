"""A LoRA adapter around a linear layer, as PEFT 0.21.2 runs it.

tuners/lora/layer.py `Linear.forward`, tuners/lora/bnb.py `Linear4bit.forward`: the adapter casts the layer's input to
its own dtype, so that each adapted layer keeps its own copy of the input when the dtypes differ, also where
neighbours share that input; `lora_A`'s output is kept for `lora_B`.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.ops.linear import Linear
from memplan.ops.pointwise import add, clone, dropout, mul_number, to
from memplan.ops.quantized import Linear4bit
from memplan.ops.tensor import Parameter, Tensor


@dataclass(slots=True)
class LoraLinear:
    """base(x) + lora_B(lora_A(dropout(x))) * scaling."""

    base: Linear | Linear4bit
    lora_A: Linear
    lora_B: Linear
    dropout: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.base, Linear4bit):
            return self._on_quantized(x)
        result = self.base(x)
        dtype = result.dtype
        x = to(x, self.lora_A.weight.dtype)
        result = add(result, mul_number(self._adapt(x)))
        return to(result, dtype)

    def _on_quantized(self, x: Tensor) -> Tensor:
        result = clone(self.base(x))
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
