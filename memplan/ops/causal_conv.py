"""A short causal convolution of each channel by itself (depthwise), its activation behind it.

transformers 5.17 models/qwen3_next/modeling_qwen3_next.py `causal_conv1d_fn`, the PyTorch code that runs where the
package causal-conv1d is not installed. B batch, C channels, S tokens, K taps (`linear_conv_kernel_dim`), d bytes an
element of the stream:

    tensor          shape           dtype   bytes               lives until
    input           [B, C, S]       stream  d B C S             convolution's backward (saved, weight frozen or not)
    F.conv1d        [B, C, S+K-1]   stream  d B C (S + K - 1)   the activation's backward (its input is a view of this)
    result          [B, C, S]       stream  d B C S             what reads it: heads are views of it

Padding is on both sides, so that the result is sliced: backward writes its gradient into zeros [B, C, S+K-1], then
makes that of the input and that of the weight [C, 1, K] (if it trains). On CUDA the kernel of depthwise convolutions
reads a contiguous copy of the input, which comes transposed, forward and backward (torch 2.11
aten/src/ATen/native/Convolution.cpp `_convolution`, `convolution_backward`: "avoid accidentally going through NHWC").
Under autocast it runs in bf16, on a cast of the weight that is not kept (a view is no leaf).
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.ops.autocast import low
from memplan.ops.autograd import Grads, Node, record, result_of
from memplan.ops.linear import transposed
from memplan.ops.pointwise import GradList, incoming, slice_last, to
from memplan.ops.tensor import Parameter, Shape, Tensor


def causal_conv(x: Tensor, weight: Parameter, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """x [B, C, S], a transposed view; weight [C, 1, K], seen as [C, K] and back. [B, C, S]."""
    tokens, taps = x.shape[-1], weight.shape[-1]
    out = slice_last(_depthwise(to(x, weight.dtype), transposed(weight), tokens + taps - 1), tokens)
    out = activation(out)
    return to(out, x.dtype)


def _depthwise(x: Tensor, weight: Tensor, width: int) -> Tensor:
    m = x.machine
    weight, x = low(weight), low(x)
    node = record(m, _depthwise_backward, (x, weight), (x, weight), meta=(x.shape, weight.shape))
    dense = _dense_input(x, x.shape)
    result = result_of(node, m, (*x.shape[:-1], width), x.dtype)
    del dense
    return result


def _depthwise_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    x_shape, weight_shape = node.meta
    saved = [node.unpack(i) for i in range(2)]
    dense = _dense_input(grad, x_shape)
    d_x = m.empty(x_shape, grad.dtype) if node.needs[0] else None
    d_weight = m.empty(weight_shape, grad.dtype) if node.needs[1] else None
    del dense, saved
    return d_x, d_weight


def _dense_input(like: Tensor, shape: Shape) -> Tensor | None:
    m = like.machine
    return m.empty(shape, like.dtype) if m.device.is_cuda else None
