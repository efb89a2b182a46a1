"""seed_oss: llama with biases on q, k and v, and dropout on what attention and MLP give.

Source: transformers 5.17 models/seed_oss/modeling_seed_oss.py. What is special for memory: its config class sets
both dropouts to 0.1, so that training keeps a mask of one byte an element for each.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Mlp
from memplan.architectures.llama import Llama
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import dropout
from memplan.ops.tensor import Tensor


class SeedOss(Llama):
    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        attention, p = super().self_attention(build, shared, rope=rope), self.spec.hidden_dropout

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            output, attn_weights = attention(x)
            return dropout(output, p) if p else output, attn_weights

        return forward

    def mlp(self, build: Builder, kind: str) -> Mlp:
        mlp, p = self.gated_mlp(build), self.spec.hidden_dropout
        return (lambda x: dropout(mlp(x), p)) if p else mlp
