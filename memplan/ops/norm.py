"""RMSNorm as transformers writes it out in elementwise ops, and LayerNorm as one kernel.

RMSNorm (models/llama/modeling_llama.py `LlamaRMSNorm`, transformers 5.17), input x of dtype d:
    x32 = x.float()            a copy unless d is fp32; saved by pow and by the product below
    rstd = rsqrt(x32.pow(2).mean(-1) + eps)        one fp32 per row, saved
    y = (x32 * rstd).to(d)     saved by the product with the weight if the weight trains
    weight * y
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.ops.autocast import high
from memplan.ops.autograd import Grads, Node, record, result_of, save_result
from memplan.ops.pointwise import (
    GradList,
    add_number,
    incoming,
    mean_last,
    mul,
    pow_number,
    rsqrt,
    saves_input,
    sub,
    to,
)
from memplan.ops.tensor import Parameter, Tensor


@dataclass(slots=True)
class RMSNorm:
    """weight * (x / rms(x)) over the last dimension; weight [hidden]."""

    weight: Parameter

    def __call__(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = to(x, DType.fp32)
        variance = mean_last(pow_number(x))
        x = mul(x, rsqrt(add_number(variance)))
        return mul(self.weight, to(x, dtype))

    def parameters(self) -> list[Parameter]:
        return [self.weight]


@dataclass(slots=True)
class LateCastRMSNorm:
    """gpt_oss's and olmo2's: (weight * x32 * rstd) in fp32, then back (models/gpt_oss/modeling_gpt_oss.py
    `GptOssRMSNorm`, models/olmo2/modeling_olmo2.py `Olmo2RMSNorm`)."""

    weight: Parameter

    def __call__(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = to(x, DType.fp32)
        variance = mean_last(pow_number(x))
        x = mul(x, rsqrt(add_number(variance)))
        return to(mul(self.weight, x), dtype)

    def parameters(self) -> list[Parameter]:
        return [self.weight]


@dataclass(slots=True)
class OffsetRMSNorm:
    """Gemma's: x32 * rstd * (1 + weight) in fp32, then back (models/gemma/modeling_gemma.py `GemmaRMSNorm`)."""

    weight: Parameter

    def __call__(self, x: Tensor) -> Tensor:
        x32 = to(x, DType.fp32)
        output = mul(x32, rsqrt(add_number(mean_last(pow_number(x32)))))
        del x32
        output = mul(output, add_number(to(self.weight, DType.fp32)))
        return to(output, x.dtype)

    def parameters(self) -> list[Parameter]:
        return [self.weight]


@dataclass(slots=True)
class CastRMSNorm:
    """llama4's: (x32 * rstd) back in the input's dtype, times the weight if there is one (models/llama4
    `Llama4TextRMSNorm`, `Llama4TextL2Norm`)."""

    weight: Parameter | None

    def __call__(self, x: Tensor) -> Tensor:
        output = to(self._norm(to(x, DType.fp32)), x.dtype)
        return output if self.weight is None else mul(output, self.weight)

    def _norm(self, x: Tensor) -> Tensor:
        return mul(x, rsqrt(add_number(mean_last(pow_number(x)))))

    def parameters(self) -> list[Parameter]:
        return [] if self.weight is None else [self.weight]


@dataclass(slots=True)
class PowRMSNorm:
    """gemma4's: x32 * (mean + eps) ** -0.5, times the weight in fp32 if there is one, then back
    (models/gemma4/modeling_gemma4.py `Gemma4RMSNorm`)."""

    weight: Parameter | None

    def __call__(self, x: Tensor) -> Tensor:
        output = self._norm(to(x, DType.fp32))
        if self.weight is not None:
            output = mul(output, to(self.weight, DType.fp32))
        return to(output, x.dtype)

    def _norm(self, x: Tensor) -> Tensor:
        mean_squared = add_number(mean_last(pow_number(x)))
        return mul(x, pow_number(mean_squared))

    def parameters(self) -> list[Parameter]:
        return [] if self.weight is None else [self.weight]


@dataclass(slots=True)
class GatedRMSNorm:
    """qwen3_next's of linear attention: weight * (x32 * rstd).to(d), times silu(gate) in fp32, then back
    (models/qwen3_next/modeling_qwen3_next.py `Qwen3NextRMSNormGated`)."""

    weight: Parameter

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype = x.dtype
        x = to(x, DType.fp32)
        variance = mean_last(pow_number(x))
        x = mul(x, rsqrt(add_number(variance)))
        x = mul(self.weight, to(x, dtype))
        x = mul(x, saves_input(to(gate, DType.fp32)))
        return to(x, dtype)

    def parameters(self) -> list[Parameter]:
        return [self.weight]


@dataclass(slots=True)
class CohereLayerNorm:
    """LayerNorm without bias, op by op in fp32 (models/cohere/modeling_cohere.py `CohereLayerNorm`)."""

    weight: Parameter

    def __call__(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = to(x, DType.fp32)
        mean = mean_last(x)
        variance = mean_last(pow_number(sub(x, mean)))
        x = mul(sub(x, mean), rsqrt(add_number(variance)))
        x = mul(to(self.weight, DType.fp32), x)
        return to(x, dtype)

    def parameters(self) -> list[Parameter]:
        return [self.weight]


@dataclass(slots=True)
class LayerNorm:
    """nn.LayerNorm over the last dimension: saves its input and, per row, mean and rstd in fp32.

    aten/src/ATen/native/cuda/layer_norm_kernel.cu: the statistics are fp32 for half inputs.
    """

    weight: Parameter | None
    bias: Parameter | None
    strided: bool = False
    """The input is no contiguous tensor (heads of a projection): the kernel works on a copy, forward and backward."""

    def __call__(self, x: Tensor) -> Tensor:
        m = x.machine
        # C++ casts its arguments from the last to the first (seen in allocation traces of an H200).
        bias = None if self.bias is None else high(self.bias)
        weight = None if self.weight is None else high(self.weight)
        x = high(x)
        copies = self.strided and m.device.is_cuda
        inputs = [x, *[t for t in (weight, bias) if t is not None]]
        saved = [x] + ([weight] if weight is not None else []) + ([bias] if bias is not None else [])
        node = record(m, _layer_norm_backward, inputs, saved, meta=(len(saved), copies))
        dense = m.empty(x.shape, x.dtype) if copies else None
        result = result_of(node, m, x.shape, x.dtype)
        rows = (*x.shape[:-1], 1)
        statistics = m.empty(rows, DType.fp32), m.empty(rows, DType.fp32)
        save_result(node, *statistics)
        del dense
        return result

    def parameters(self) -> list[Parameter]:
        return [p for p in (self.weight, self.bias) if p is not None]


def _layer_norm_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    num_inputs, copies = node.meta
    saved = [node.unpack(i) for i in range(len(node.saved))]
    dense = m.empty(grad.shape, grad.dtype) if copies else None
    out: list[Tensor | None] = [m.empty(grad.shape, grad.dtype) if node.needs[0] else None]
    for index in range(1, num_inputs):
        out.append(m.empty(saved[index].shape, saved[index].dtype) if node.needs[index] else None)
    del saved, dense
    return out
