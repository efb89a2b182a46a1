"""phi (1, 1.5, 2): one LayerNorm for attention and a plain MLP side by side, biases everywhere, partial rotation.

Source: transformers 5.17 models/phi/modeling_phi.py.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Layer, Mlp, Norm
from memplan.architectures.shared import Shared
from memplan.architectures.stablelm import StableLm
from memplan.ops.pointwise import add, dropout
from memplan.ops.tensor import Tensor


class Phi(StableLm):
    output_name = "dense"

    def enter(self, build: Builder, hidden_states: Tensor) -> Tensor:
        return dropout(hidden_states, self.spec.embedding_dropout)

    def final_norm(self, build: Builder) -> Norm:
        return build.layer_norm("model.final_layernorm", self.spec.hidden_size)

    def seen_by_heads(self, x: Tensor, q_proj: Mlp, k_proj: Mlp, v_proj: Mlp) -> tuple[Tensor, Tensor, Tensor]:
        """Each is viewed as soon as it is projected."""
        heads, kv_heads = self.spec.num_attention_heads, self.spec.num_key_value_heads
        q, k = self.heads(q_proj(x), heads, rotated=True), self.heads(k_proj(x), kv_heads, rotated=True)
        return q, k, self.heads(v_proj(x), kv_heads)

    def head_norm(self, build: Builder, name: str, num_heads: int) -> Norm:
        return build.layer_norm(name, self.spec.head_dim, strided=True)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        spec = self.spec
        attention = self.self_attention(build, shared)
        mlp = self.plain_mlp(build)
        norm = self.norm(build, "input_layernorm", spec.hidden_size)
        p = spec.hidden_dropout

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            attn_outputs, _ = attention(hidden_states)
            attn_outputs = dropout(attn_outputs, p)
            feed_forward_hidden_states = dropout(mlp(hidden_states), p)
            hidden_states = add(add(attn_outputs, feed_forward_hidden_states), residual)
            return hidden_states  # noqa: RET504  the old one dies after it, as in the module

        return forward

    def plain_mlp(self, build: Builder) -> Mlp:
        spec = self.spec
        fc1 = build.linear("mlp.fc1", spec.hidden_size, spec.intermediate_size, bias=spec.mlp_bias)
        fc2 = build.linear("mlp.fc2", spec.intermediate_size, spec.hidden_size, bias=spec.mlp_bias)
        activation = self.activation()

        def forward(x: Tensor) -> Tensor:  # `x` stays: nn.Module.__call__ holds its arguments
            hidden_states = fc1(x)
            hidden_states = activation(hidden_states)
            return fc2(hidden_states)

        return forward
