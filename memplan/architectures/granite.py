"""granite: llama with four multipliers.

Source: transformers 5.17 models/granite/modeling_granite.py. What is special for memory: embeddings, what attention and
MLP add, and logits are each multiplied by a number, a product of its own each time; the multiplier of attention is its
scale and costs nothing.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Layer
from memplan.architectures.llama import Llama
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import add, mul_number
from memplan.ops.tensor import Tensor


class Granite(Llama):
    def embed(self, build: Builder) -> Tensor:
        return mul_number(self.embed_tokens(build))

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", self.spec.hidden_size)
        post_norm = self.norm(build, "post_attention_layernorm", self.spec.hidden_size)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states, _ = attention(hidden_states)
            hidden_states = add(residual, mul_number(hidden_states))
            residual = hidden_states
            hidden_states = post_norm(hidden_states)
            hidden_states = mlp(hidden_states)
            hidden_states = add(residual, mul_number(hidden_states))
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward

    def after_head(self, logits: Tensor) -> Tensor:
        return mul_number(logits)
