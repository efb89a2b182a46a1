"""starcoder2: llama's attention with biases, LayerNorm, a plain MLP, dropouts on what both add to the residual.

Source: transformers 5.17 models/starcoder2/modeling_starcoder2.py. With a sliding window all layers share its mask.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Mlp, Norm
from memplan.architectures.mistral import Mistral
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import dropout
from memplan.ops.tensor import Tensor


class Starcoder2(Mistral):
    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return build.layer_norm(name, width)

    def enter(self, build: Builder, hidden_states: Tensor) -> Tensor:
        return dropout(hidden_states, self.spec.embedding_dropout)

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        attend = super().self_attention(build, shared, rope=rope)
        p = self.spec.hidden_dropout

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            attn_output, attn_weights = attend(x)
            attn_output = dropout(attn_output, p)
            return attn_output, attn_weights

        return forward

    def mlp(self, build: Builder, kind: str) -> Mlp:
        spec = self.spec
        c_fc = build.linear("mlp.c_fc", spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        c_proj = build.linear("mlp.c_proj", spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        activation = self.activation()
        p = spec.hidden_dropout

        def forward(x: Tensor) -> Tensor:  # `x` stays: nn.Module.__call__ holds its arguments
            hidden_states = c_fc(x)
            hidden_states = activation(hidden_states)
            hidden_states = c_proj(hidden_states)
            hidden_states = dropout(hidden_states, p)
            return hidden_states  # noqa: RET504  the old one dies after it, as in the module

        return forward
