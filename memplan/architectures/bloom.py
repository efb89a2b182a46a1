"""bloom: a norm behind the embedding, biases by distance (alibi), its own attention and GELU; eager attention only.

Source: transformers 5.17 models/bloom/modeling_bloom.py. For memory:

- without an attention_mask the model makes one of ones [B, S] in fp32, and always an additive mask [B, 1, S, S];
- q, k and v are picked out of one projection [B, S, N, 3, H]; in backward each fills a tensor of that whole size;
- baddbmm adds alibi [B * N, 1, S] to the scores, whose backward scales each gradient into another tensor; the scores
  live until attention returns;
- `BloomGelu` is an autograd.Function that keeps its input, and writes itself out in elementwise ops both ways;
- the block returns the attention probabilities, and the model holds them until the next block has returned.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Decoder, Layer, Norm
from memplan.architectures.shared import Shared, causal_mask
from memplan.dtypes import DType
from memplan.ops.activations import bloom_gelu
from memplan.ops.attention import operand, softmax_fp32
from memplan.ops.linear import baddbmm, bmm
from memplan.ops.pointwise import add, contiguous, dropout, slice_last, to
from memplan.ops.tensor import Machine, Tensor

WithResidual = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Bloom(Decoder):
    layer_prefix = "transformer.h"
    embedding_name = "transformer.word_embeddings"
    supports_sdpa = False

    def rotary_dim(self) -> int | None:
        return None

    def embed(self, build: Builder) -> Tensor:
        inputs_embeds = self.embed_tokens(build)
        layer_norm = build.layer_norm("transformer.word_embeddings_layernorm", self.spec.hidden_size)
        hidden_states = layer_norm(inputs_embeds)
        mask = [] if self.gets_mask else [build.machine.empty(self.batch, DType.fp32)]
        build.holds(*mask, inputs_embeds)
        return hidden_states

    def make_shared(self, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Shared:
        mask_dtype = DType.int64 if self.gets_mask else DType.fp32
        alibi = build_alibi_tensor(machine, self.batch, self.spec.num_attention_heads, mask_dtype, dtype)
        mask = causal_mask(self, machine, self.embedding_dtype, window=None, given=True)
        return Shared(alibi=alibi, mask=mask)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        hidden = self.spec.hidden_size
        input_layernorm = build.layer_norm("input_layernorm", hidden)
        attention = self.self_attention(build, shared)
        post_attention_layernorm = build.layer_norm("post_attention_layernorm", hidden)
        mlp = self.mlp(build)

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
            layernorm_output = input_layernorm(hidden_states)
            attention_output, attn_weights = attention(layernorm_output, hidden_states)
            layernorm_output = post_attention_layernorm(attention_output)
            output = mlp(layernorm_output, attention_output)
            return output, attn_weights

        return forward

    def self_attention(self, build: Builder, shared: Shared) -> WithResidual:
        spec = self.spec
        hidden, heads, head_dim = spec.hidden_size, spec.num_attention_heads, spec.head_dim
        query_key_value = build.linear("self_attention.query_key_value", hidden, 3 * hidden, bias=True)
        dense = build.linear("self_attention.dense", hidden, hidden, bias=True)

        def forward(hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            batch, tokens = hidden_states.shape[:2]
            by_head = (batch, heads, tokens, head_dim)
            square = (batch * heads, tokens, tokens)
            fused_qkv = query_key_value(hidden_states).view(batch, tokens, heads, 3 * head_dim)
            query_layer = slice_last(fused_qkv, head_dim).view(*by_head)
            key_layer = slice_last(fused_qkv, head_dim).view(*by_head)
            value_layer = slice_last(fused_qkv, head_dim).view(*by_head)
            query_layer = operand(query_layer, batch > 1)
            key_layer = operand(key_layer, batch > 1)
            value_layer = operand(value_layer, batch > 1)
            assert shared.alibi is not None and shared.mask is not None
            attention_scores = baddbmm(shared.alibi, query_layer, key_layer, square)
            attn_weights = attention_scores.view(batch, heads, tokens, tokens)
            attn_weights = add(attn_weights, shared.mask)
            attention_probs = to(softmax_fp32(attn_weights), query_layer.dtype)
            attention_probs = dropout(attention_probs, spec.attention_dropout)
            context_layer = bmm(attention_probs, value_layer, by_head)
            context_layer = contiguous(context_layer).view(*hidden_states.shape)
            output_tensor = dense(context_layer)
            output_tensor = dropout_add(output_tensor, residual, spec.hidden_dropout)
            return output_tensor, attention_probs

        return forward

    def mlp(self, build: Builder) -> Callable[[Tensor, Tensor], Tensor]:
        spec = self.spec
        dense_h_to_4h = build.linear("mlp.dense_h_to_4h", spec.hidden_size, spec.intermediate_size, bias=True)
        dense_4h_to_h = build.linear("mlp.dense_4h_to_h", spec.intermediate_size, spec.hidden_size, bias=True)

        def forward(x: Tensor, residual: Tensor) -> Tensor:
            hidden_states = bloom_gelu(dense_h_to_4h(x))
            intermediate_output = dense_4h_to_h(hidden_states)
            return dropout_add(intermediate_output, residual, spec.hidden_dropout)

        return forward

    def final_norm(self, build: Builder) -> Norm:
        return build.layer_norm("transformer.ln_f", self.spec.hidden_size)


def dropout_add(x: Tensor, residual: Tensor, p: float) -> Tensor:
    out = dropout(x, p)
    return add(residual, out)


def build_alibi_tensor(m: Machine, batch: tuple[int, int], num_heads: int, mask_dtype: DType, dtype: DType) -> Tensor:
    """Biases [B * N, 1, S] in `dtype`, counted from the attention_mask [B, S] (`build_alibi_tensor`)."""
    slopes = alibi_slopes(m, num_heads)
    counted = m.empty(batch, mask_dtype)
    shifted = m.empty(batch, mask_dtype)
    del counted
    arange = m.empty(batch, mask_dtype)
    del shifted
    alibi = m.empty((batch[0] * num_heads, 1, batch[1]), DType.fp32)
    cast = to(alibi, dtype)
    del slopes, arange
    return cast


def alibi_slopes(m: Machine, num_heads: int) -> list[Tensor]:
    """A slope a head; those beyond a power of two are made apart and concatenated."""
    power = 1 << (num_heads.bit_length() - 1)
    made = [m.empty((), DType.fp32), m.empty((power,), DType.int32), m.empty((power,), DType.fp32)]
    if power != num_heads:
        rest = num_heads - power
        made += [m.empty((), DType.fp32), m.empty((rest,), DType.int32)]
        extra = m.empty((rest,), DType.fp32)
        made[2] = m.empty((num_heads,), DType.fp32)
        del extra
    return made
