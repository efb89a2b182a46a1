"""Products of sorted rows with one matrix a group: torch.nn.functional.grouped_mm.

    x [rows, in] · weight [groups, in, out] -> [rows, out]      saves both and the offsets of the groups
    backward: the weight's gradient, then x's

A weight stored [groups, out, in] is passed as its transposed view, which changes no size.

Memory does not depend on how many rows a group has. Source: torch 2.11 aten/src/ATen/native/cuda/GroupedBlas.cpp and
GroupMM.cu: bf16 on Hopper and Blackwell runs one CUTLASS kernel with two buffers of its own, anything else a loop of
products that write into the result.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, record, result_of
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.tensor import Machine, Shape, Tensor

_POINTERS, _POINTER_ALIGNMENT = 3, 2
_STRIDES_AND_SIZES = 3 * 8 + 3 * 4  # three strides of 8 bytes, a problem shape of three int32
_TENSOR_MAPS_PER_SM = 4 * 128  # CUTLASS sm90 array GEMM: two of the main loop, two of the epilogue


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, out_features: int) -> Tensor:
    """F.grouped_mm(x, weight, offs=offsets); x and weight are of one dtype."""
    m = x.machine
    node = None
    if m.grad_enabled and (x.requires_grad or weight.requires_grad):
        saved = [offsets] + ([x] if weight.requires_grad else []) + ([weight] if x.requires_grad else [])
        node = record(m, _grouped_mm_backward, (x, weight), saved, meta=(x.shape, weight.shape))
    result = result_of(node, m, (x.shape[0], out_features), x.dtype)
    _kernel_buffers(m, x.dtype, weight.shape)
    return result


def _grouped_mm_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    x_shape, weight_shape = node.meta
    saved = [node.unpack(i) for i in range(len(node.saved))]
    d_x = d_weight = None
    if node.needs[1]:
        d_weight = m.empty(weight_shape, grad.dtype)
        _kernel_buffers(m, grad.dtype, weight_shape)
    if node.needs[0]:
        d_x = m.empty(x_shape, grad.dtype)
        _kernel_buffers(m, grad.dtype, weight_shape)
    del saved
    return d_x, d_weight


def _kernel_buffers(m: Machine, dtype: DType, weight_shape: Shape) -> None:
    if not m.device.is_cuda or dtype is not DType.bf16:
        return
    groups = weight_shape[0]
    aligned = -(-groups // _POINTER_ALIGNMENT) * _POINTER_ALIGNMENT
    arguments = m.workspace(aligned * _POINTERS * 8 + groups * _STRIDES_AND_SIZES)
    workspace = m.workspace(_TENSOR_MAPS_PER_SM * m.device.num_sms)
    del workspace, arguments


def batched_add(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """torch.baddbmm(weight, left, right, alpha=number): weight [G, a, b] + left [G, a, r] · right [G, r, b].

    `left` is laid out so that cuBLAS needs a contiguous copy of it, forward and backward.
    """
    m = weight.machine
    inputs = (weight, left, right)
    node = None
    if m.grad_enabled and any(t.requires_grad for t in inputs):
        saved = ([right] if left.requires_grad else []) + ([left] if right.requires_grad else [])
        node = record(m, _batched_add_backward, inputs, saved, meta=(left.shape, right.shape))
    result = result_of(node, m, weight.shape, weight.dtype)
    _contiguous_copy(m, left)
    return result


def _batched_add_backward(node: Node, grads: GradList) -> Grads:
    grad, m = incoming(grads), node.machine
    left_shape, right_shape = node.meta
    saved = [node.unpack(i) for i in range(len(node.saved))]
    d_left = d_right = None
    if node.needs[1]:
        product = m.empty(left_shape, grad.dtype)
        d_left = m.empty(left_shape, grad.dtype)  # times alpha
        del product
    if node.needs[2]:
        product = m.empty(right_shape, grad.dtype)
        _contiguous_copy(m, saved[-1])
        d_right = m.empty(right_shape, grad.dtype)
        del product
    del saved
    return (grad if node.needs[0] else None), d_left, d_right


def _contiguous_copy(m: Machine, x: Tensor) -> None:
    if m.device.is_cuda:
        copy = m.empty(x.shape, x.dtype)
        del copy
