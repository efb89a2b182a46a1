"""ministral3: mistral whose queries are scaled by their positions after the rotation.

Source: transformers 5.17 models/ministral3/modeling_ministral3.py. What is special for memory: each layer computes the
scale, [1, 1, S, 1], anew and keeps it for the gradient of the queries; the rotated queries themselves are let go.
"""

from __future__ import annotations

from memplan.architectures.mistral import Mistral
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.ops.pointwise import mul, to
from memplan.ops.tensor import Tensor


class Ministral3(Mistral):
    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        q, k = super().rotate(q, k, shared)
        q = mul(q, to(position_scale(q, shared), q.dtype))
        return q, k


def position_scale(q: Tensor, shared: Shared) -> Tensor:
    """`get_llama_4_attn_scale`: 1 + beta * log(1 + floor(positions / original_max_position_embeddings)), in fp32."""
    assert shared.position_ids is not None
    tokens = shared.position_ids.shape[-1]
    scale = q.machine.empty((1, tokens), DType.fp32)
    for _ in ("floor", "1 +", "log", "beta *", "1 +"):
        scale = q.machine.empty((1, tokens), DType.fp32)
    return scale.view(1, 1, tokens, 1)
