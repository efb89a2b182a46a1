"""phi3: llama with fused projections, dropout on what attention and MLP add, and possibly a partial rotation.

Source: transformers 5.17 models/phi3/modeling_phi3.py. What is special for memory:
- q, k and v are slices of one projection, each of whose gradients is written into zeros of the whole; v keeps all
  of it for backward; gate and up are halves of one product in the same way;
- the rotation ends in a concatenation even where the whole head rotates, which leaves q and k by heads in memory;
- one mask for all layers, that of a sliding window where the config has one.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Layer, Mlp
from memplan.architectures.mistral import Mistral
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import add, dropout, mul, slice_last, split_last
from memplan.ops.rotary import apply_partial_rotary
from memplan.ops.tensor import Tensor


class Phi3(Mistral):
    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", self.spec.hidden_size)
        post_norm = self.norm(build, "post_attention_layernorm", self.spec.hidden_size)
        p = self.spec.hidden_dropout

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states, _ = attention(hidden_states)
            hidden_states = add(residual, dropout(hidden_states, p) if p else hidden_states)
            residual = hidden_states
            hidden_states = post_norm(hidden_states)
            hidden_states = mlp(hidden_states)
            hidden_states = add(residual, dropout(hidden_states, p) if p else hidden_states)
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        hidden, width = spec.hidden_size, spec.num_attention_heads * spec.head_dim
        kv_width = spec.num_key_value_heads * spec.head_dim
        o_proj = build.linear("self_attn.o_proj", width, hidden)
        qkv_proj = build.linear("self_attn.qkv_proj", hidden, width + 2 * kv_width)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            qkv = qkv_proj(x)
            q, k, v = slice_last(qkv, width), slice_last(qkv, kv_width), slice_last(qkv, kv_width)
            q = self.heads(q, spec.num_attention_heads, shared, rotated=True)
            k = self.heads(k, spec.num_key_value_heads, shared, rotated=True)
            v = self.heads(v, spec.num_key_value_heads, shared)
            q, k = self.rotate(q, k, shared)
            output, attn_weights = self.attention(q, k, v, shared, by_heads=True)
            output = output.view(*x.shape[:-1], width)
            output = o_proj(output)
            return output, attn_weights

        return forward

    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None and shared.sin is not None
        width = shared.cos.shape[-1]
        q_embed = apply_partial_rotary(q, shared.cos, shared.sin, width)
        k_embed = apply_partial_rotary(k, shared.cos, shared.sin, width)
        return q_embed, k_embed

    def mlp(self, build: Builder, kind: str) -> Mlp:
        return self.fused_mlp(build)

    def fused_mlp(self, build: Builder) -> Mlp:
        """down_proj(up * act(gate)) with gate and up from one product."""
        hidden, width = self.spec.hidden_size, self.spec.intermediate_size
        gate_up_proj = build.linear("mlp.gate_up_proj", hidden, 2 * width)
        down_proj = build.linear("mlp.down_proj", width, hidden)
        activation = self.activation()

        def forward(hidden_states: Tensor) -> Tensor:
            up_states = gate_up_proj(hidden_states)
            gate, up_states = split_last(up_states, width, width)
            up_states = mul(up_states, activation(gate))
            return down_proj(up_states)

        return forward
