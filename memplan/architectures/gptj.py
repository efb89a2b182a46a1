"""gptj: attention and MLP side by side behind one norm, rotation of pairs, fp32 scores; eager attention only.

Source: transformers 5.17 models/gptj/modeling_gptj.py. For memory:

- each layer has a table of sines and cosines for all positions as a buffer in fp32, copies it whole in its forward and
  gathers from the copy; sine and cosine are then doubled once for the keys and once for the queries, and saved;
- queries and keys are cast to fp32 for their product, whose scores stay fp32 up to the softmax;
- the block returns the attention probabilities, and the model holds them until the next block has returned.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Decoder, Layer, Mlp, Norm
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.ops.attention import matmul, softmax, weighted_values
from memplan.ops.pointwise import add, cat_last, contiguous, dropout, mul, mul_number, neg, slice_last, to
from memplan.ops.tensor import Machine, Tensor


class GPTJ(Decoder):
    layer_prefix = "transformer.h"
    embedding_name = "transformer.wte"
    looks_up_positions = True
    supports_sdpa = False

    def rotary_dim(self) -> int | None:
        return None  # no table that layers share

    def embed(self, build: Builder) -> Tensor:
        inputs_embeds = self.embed_tokens(build)
        build.holds(inputs_embeds)
        return inputs_embeds

    def enter(self, build: Builder, hidden_states: Tensor) -> Tensor:
        return dropout(hidden_states, self.spec.embedding_dropout)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        ln_1 = build.layer_norm("ln_1", self.spec.hidden_size)
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build)

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
            residual = hidden_states
            hidden_states = ln_1(hidden_states)
            attn_outputs, attn_weights = attention(hidden_states)
            feed_forward_hidden_states = mlp(hidden_states)
            hidden_states = add(add(attn_outputs, feed_forward_hidden_states), residual)
            return hidden_states, attn_weights

        return forward

    def self_attention(self, build: Builder, shared: Shared) -> Attention:
        spec = self.spec
        hidden, heads, head_dim = spec.hidden_size, spec.num_attention_heads, spec.head_dim
        k_proj = build.linear("attn.k_proj", hidden, hidden)
        v_proj = build.linear("attn.v_proj", hidden, hidden)
        q_proj = build.linear("attn.q_proj", hidden, hidden)
        out_proj = build.linear("attn.out_proj", hidden, hidden)
        assert spec.max_position_embeddings is not None
        width = spec.rotary_dim or head_dim
        table = (spec.max_position_embeddings, width)
        build.buffer("attn.embed_positions", table, DType.fp32)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            query, key, value = q_proj(x), k_proj(x), v_proj(x)
            by_token = (*x.shape[:2], heads, head_dim)
            query, key = query.view(*by_token), key.view(*by_token)
            value = self.heads(value, heads)
            _embed_positions, _repeated_ids, sincos = sines_and_cosines(x.machine, table, x.shape[1], key.dtype)
            sin, cos = slice_last(sincos, width // 2), slice_last(sincos, width // 2)
            k_rot, k_pass = slice_last(key, width), slice_last(key, head_dim - width)
            q_rot, q_pass = slice_last(query, width), slice_last(query, head_dim - width)
            k_rot = apply_rotary_to_pairs(k_rot, sin, cos)
            q_rot = apply_rotary_to_pairs(q_rot, sin, cos)
            key = cat_last([k_rot, k_pass])
            query = cat_last([q_rot, q_pass])
            by_head = (x.shape[0], heads, x.shape[1], head_dim)
            key, query = key.view(*by_head), query.view(*by_head)
            attn_output, attn_weights = self.attend(query, key, value, shared.mask)
            attn_output = contiguous(attn_output).view(*x.shape)
            attn_output = out_proj(attn_output)
            attn_output = dropout(attn_output, spec.hidden_dropout)
            return attn_output, attn_weights

        return forward

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`GPTJAttention._attn`."""
        copies = query.shape[0] > 1
        query = to(query, DType.fp32)
        key = to(key, DType.fp32)
        scores_shape = (*query.shape[:3], key.shape[2])
        attn_weights = matmul(query, key, scores_shape, copies=(copies, copies))
        attn_weights = mul_number(attn_weights)
        if mask is not None:
            attn_weights = add(attn_weights, mask)
        attn_weights = softmax(attn_weights)
        attn_weights = to(attn_weights, value.dtype)
        attn_weights = dropout(attn_weights, self.spec.attention_dropout)
        return weighted_values(attn_weights, value, by_tokens=True), attn_weights

    def mlp(self, build: Builder) -> Mlp:
        spec = self.spec
        fc_in = build.linear("mlp.fc_in", spec.hidden_size, spec.intermediate_size, bias=True)
        fc_out = build.linear("mlp.fc_out", spec.intermediate_size, spec.hidden_size, bias=True)
        activation = self.activation()

        def forward(x: Tensor) -> Tensor:
            hidden_states = fc_in(x)
            hidden_states = activation(hidden_states)
            hidden_states = fc_out(hidden_states)
            return dropout(hidden_states, spec.hidden_dropout)

        return forward

    def final_norm(self, build: Builder) -> Norm:
        return build.layer_norm("transformer.ln_f", self.spec.hidden_size)


def sines_and_cosines(m: Machine, table: tuple[int, int], tokens: int, dtype: DType) -> tuple[Tensor, Tensor, Tensor]:
    """The table copied, the positions it is gathered at, and the rows gathered [1, S, width] in `dtype`."""
    embed_positions = m.empty((1, *table), DType.fp32)
    repeated_position_ids = m.empty((1, tokens, table[1]), DType.int64)
    gathered = m.empty((1, tokens, table[1]), DType.fp32)
    return embed_positions, repeated_position_ids, to(gathered, dtype)


def apply_rotary_to_pairs(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """`apply_rotary_pos_emb`: x [B, S, N, width] with sin and cos [1, S, width / 2], each doubled by a copy."""
    m, doubled = x.machine, (1, x.shape[1], 1, x.shape[3])
    sin, cos = m.empty(doubled, sin.dtype), m.empty(doubled, cos.dtype)
    return add(mul(x, cos), mul(rotate_every_two(x), sin))


def rotate_every_two(x: Tensor) -> Tensor:
    """torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)"""
    half = (*x.shape[:-1], x.shape[-1] // 2)
    even, odd = slice_last(x, half[-1]), slice_last(x, half[-1])
    return cat_last([neg(odd).view(*half, 1), even.view(*half, 1)]).view(*x.shape)
