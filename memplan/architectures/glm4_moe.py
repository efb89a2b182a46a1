"""glm4_moe (GLM-4.5): grouped heads of which half rotates, and deepseek_v3's experts and router.

Source: transformers 5.17 models/glm4_moe/modeling_glm4_moe.py. For memory: all projections are made before q and k
are normed by head (where they are), and the rotation ends in a concatenation, which leaves q and k by heads.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention
from memplan.architectures.deepseek import DeepseekV3
from memplan.architectures.llama import Llama
from memplan.architectures.shared import Shared
from memplan.ops.tensor import Tensor


class Glm4Moe(DeepseekV3):
    norms_heads_last = True

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        return Llama.self_attention(self, build, shared, rope=rope)

    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        return Llama.rotate(self, q, k, shared)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, shared: Shared, *, p: float | None = None, by_heads: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        return super().attention(q, k, v, shared, p=p, by_heads=by_heads)
