"""glm and glm4: half of each head rotates, neighbours as pairs; gate and up from one product; glm4 has more norms.

Sources: transformers 5.17 models/glm/modeling_glm.py, models/glm4/modeling_glm4.py. What is special for memory:
- each layer makes rotary tables of its own out of the shared ones, and keeps them;
- the rotation ends in a concatenation, which leaves q and k by heads in memory;
- glm4 has a norm after attention and after the MLP as well.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Layer
from memplan.architectures.phi3 import Phi3
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import add
from memplan.ops.rotary import apply_partial_rotary_pairs
from memplan.ops.tensor import Tensor


class Glm(Phi3):
    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        hidden, width = spec.hidden_size, spec.num_attention_heads * spec.head_dim
        kv_width = spec.num_key_value_heads * spec.head_dim
        q_proj = build.linear("self_attn.q_proj", hidden, width, bias=spec.attention_bias)
        k_proj = build.linear("self_attn.k_proj", hidden, kv_width, bias=spec.attention_bias)
        v_proj = build.linear("self_attn.v_proj", hidden, kv_width, bias=spec.attention_bias)
        o_proj = build.linear("self_attn.o_proj", width, hidden)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q = self.heads(q_proj(x), spec.num_attention_heads, shared, rotated=True)
            k = self.heads(k_proj(x), spec.num_key_value_heads, shared, rotated=True)
            v = self.heads(v_proj(x), spec.num_key_value_heads, shared)
            q, k = self.rotate(q, k, shared)
            output, attn_weights = self.attention(q, k, v, shared, by_heads=True)
            output = output.view(*x.shape[:-1], width)
            output = o_proj(output)
            return output, attn_weights

        return forward

    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None and shared.sin is not None
        return apply_partial_rotary_pairs(q, k, shared.cos, shared.sin)


class Glm4(Glm):
    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        hidden = self.spec.hidden_size
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", hidden)
        post_norm = self.norm(build, "post_attention_layernorm", hidden)
        post_attention_norm = self.norm(build, "post_self_attn_layernorm", hidden)
        post_mlp_norm = self.norm(build, "post_mlp_layernorm", hidden)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states, _ = attention(hidden_states)
            hidden_states = post_attention_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            residual = hidden_states
            hidden_states = post_norm(hidden_states)
            hidden_states = mlp(hidden_states)
            hidden_states = post_mlp_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward
