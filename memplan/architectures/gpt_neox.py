"""gpt_neox (pythia): fused q, k, v by head, a part of each head rotated, attention and MLP side by side.

Source: transformers 5.17 models/gpt_neox/modeling_gpt_neox.py. For memory:

- q, k and v are chunks of one projection, seen [B, N, S, 3 * H]; their gradients are concatenated by heads, and the
  sum is copied into token order;
- rotating a part of the head concatenates it with the rest, so that q and k lie by heads and attention's result does
  too: it is copied once more before the output projection;
- attention and MLP both read the layer's input through a norm of their own; without `use_parallel_residual` the MLP
  reads what attention has added to it.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Decoder, Layer, Mlp, Norm
from memplan.architectures.shared import Shared
from memplan.ops.attention import split_heads
from memplan.ops.pointwise import add, dropout, split_last
from memplan.ops.rotary import apply_partial_rotary_pair
from memplan.ops.tensor import Tensor


class GPTNeoX(Decoder):
    layer_prefix = "gpt_neox.layers"
    embedding_name = "gpt_neox.embed_in"
    rotary_name = "gpt_neox.rotary_emb"

    def embed(self, build: Builder) -> Tensor:
        inputs_embeds = self.embed_tokens(build)
        build.holds(inputs_embeds)
        return inputs_embeds

    def enter(self, build: Builder, hidden_states: Tensor) -> Tensor:
        return dropout(hidden_states, self.spec.embedding_dropout)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        spec = self.spec
        input_layernorm = build.layer_norm("input_layernorm", spec.hidden_size)
        post_attention_layernorm = build.layer_norm("post_attention_layernorm", spec.hidden_size)
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build)
        p = spec.hidden_dropout

        def forward(hidden_states: Tensor) -> Tensor:
            attn_output, _ = attention(input_layernorm(hidden_states))
            attn_output = dropout(attn_output, p)
            if spec.parallel_residual:
                mlp_output = mlp(post_attention_layernorm(hidden_states))
                mlp_output = dropout(mlp_output, p)
                hidden_states = add(add(mlp_output, attn_output), hidden_states)
            else:
                attn_output = add(attn_output, hidden_states)
                mlp_output = mlp(post_attention_layernorm(attn_output))
                mlp_output = dropout(mlp_output, p)
                hidden_states = add(mlp_output, attn_output)
            return hidden_states

        return forward

    def self_attention(self, build: Builder, shared: Shared) -> Attention:
        spec = self.spec
        hidden, heads, head_dim = spec.hidden_size, spec.num_attention_heads, spec.head_dim
        query_key_value = build.linear("attention.query_key_value", hidden, 3 * hidden, bias=spec.attention_bias)
        dense = build.linear("attention.dense", hidden, hidden, bias=spec.attention_out_bias)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            qkv = split_heads(query_key_value(x), heads, 3 * head_dim, copies=True)
            q, k, v = split_last(qkv, head_dim, head_dim, head_dim)
            assert shared.cos is not None and shared.sin is not None
            q, k = apply_partial_rotary_pair(q, k, shared.cos, shared.sin)
            attn_output, attn_weights = self.attention(q, k, v, shared, by_heads=True)
            attn_output = attn_output.view(*x.shape)
            attn_output = dense(attn_output)
            return attn_output, attn_weights

        return forward

    def mlp(self, build: Builder) -> Mlp:
        spec = self.spec
        dense_h_to_4h = build.linear("mlp.dense_h_to_4h", spec.hidden_size, spec.intermediate_size, bias=True)
        dense_4h_to_h = build.linear("mlp.dense_4h_to_h", spec.intermediate_size, spec.hidden_size, bias=True)
        activation = self.activation()

        def forward(x: Tensor) -> Tensor:  # `x` stays: nn.Module.__call__ holds its arguments
            hidden_states = dense_h_to_4h(x)
            hidden_states = activation(hidden_states)
            return dense_4h_to_h(hidden_states)

        return forward

    def final_norm(self, build: Builder) -> Norm:
        return build.layer_norm("gpt_neox.final_layer_norm", self.spec.hidden_size)
