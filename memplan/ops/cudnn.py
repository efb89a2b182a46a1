"""scaled_dot_product_attention by cuDNN: what sdpa runs for half precision on Hopper and data-centre Blackwell.

Saves q, k, v, the result, one fp32 log-sum-exp per query and head, the random state and, unlike flash, the additive
mask [B, 1, S, S], which each layer makes anew from the model's boolean one.
Source: torch 2.11 aten/src/ATen/native/cudnn/MHA.cpp, native/transformers/cuda/attention.cu and sdp_utils.cpp
(`check_cudnn_tensor_shapes`). The workspaces are cuDNN's own: read off allocation traces of an H200 (torch 2.11+cu130,
S = 512), exact there for every head_dim and head count seen.
"""

from __future__ import annotations

from memplan.dtypes import DType
from memplan.ops.autograd import Grads, Node, attach, record, save_result
from memplan.ops.pointwise import GradList
from memplan.ops.tensor import AttentionCall, Tensor

MAX_HEAD_DIM = 256
FORWARD_WORKSPACE_BYTES = BACKWARD_CONSTANT_BYTES = 256


def takes_cudnn(q: Tensor, v: Tensor) -> bool:
    """Whether cuDNN has a kernel for queries and values of these widths and dtype."""
    widths = q.shape[-1], v.shape[-1]
    return q.dtype.is_half and max(widths) <= MAX_HEAD_DIM and not any(width % 8 for width in widths)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, N, S, H], k and v [B, K, S, H]: the result in token order, [B, S, N, H]."""
    m = q.machine
    m.attention = AttentionCall("cudnn", q.dtype, mask is not None)
    if mask is not None and not mask.dtype.is_floating:
        mask = m.empty(mask.shape, q.dtype)
    saved = (q, k, v) if mask is None else (q, k, v, mask)
    node = record(m, _cudnn_backward, (q, k, v), saved)
    del saved
    batch, heads, tokens, _ = q.shape
    random_state = m.empty((), DType.int64), m.empty((), DType.int64)
    result = attach(node, m.empty((batch, tokens, heads, v.shape[-1]), q.dtype))
    log_sum_exp = m.empty((batch, heads, tokens), DType.fp32)
    save_result(node, log_sum_exp, result, *random_state)
    if m.device.is_cuda:
        m.workspace(FORWARD_WORKSPACE_BYTES)
    del mask, log_sum_exp  # the operator's own, up to its end
    return result


def _cudnn_backward(node: Node, grads: GradList) -> Grads:
    saved = [node.unpack(i) for i in range(len(node.saved))]
    q, k, v = saved[:3]
    m = node.machine
    d_q, d_k, d_v = m.empty(q.shape, q.dtype), m.empty(k.shape, k.dtype), m.empty(v.shape, v.dtype)
    if m.device.is_cuda:
        m.workspace(backward_workspace_bytes(q, k, v))
    del saved, q, k, v
    return d_q, d_k, d_v


def backward_workspace_bytes(q: Tensor, k: Tensor, v: Tensor) -> int:
    """fp32 dq and row sums of dO * O; with grouped heads also dk and dv of every query head."""
    batch, heads, tokens, width = q.shape
    rows = batch * heads * tokens
    grouped = rows * (width + v.shape[-1]) * q.dtype.itemsize if k.shape[1] != heads else 0
    return BACKWARD_CONSTANT_BYTES + 4 * rows + 4 * rows * width + grouped
