"""mpt: fused q, k, v, biases by distance (alibi) over all positions, no biases in layers; eager attention only.

Source: transformers 5.17 models/mpt/modeling_mpt.py. For memory:

- alibi is made for `max_seq_len` positions, [N, 1, max_seq_len] in fp32, and makes the scores fp32 when it is added;
- the additive mask is turned into a boolean one, which masked_fill keeps; the masked fp32 scores live until attention
  returns, beside the probabilities;
- the block returns the attention probabilities, and the model holds them until the next block has returned.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Decoder, Layer, Norm
from memplan.architectures.shared import Shared, causal_mask
from memplan.dtypes import DType
from memplan.ops.attention import matmul, softmax, weighted_values
from memplan.ops.clamp import clamp
from memplan.ops.pointwise import add, contiguous, dropout, mul_number, split_last, to
from memplan.ops.rows import masked_fill
from memplan.ops.tensor import Machine, Tensor


class Mpt(Decoder):
    layer_prefix = "transformer.blocks"
    embedding_name = "transformer.wte"
    looks_up_positions = True
    supports_sdpa = False

    def rotary_dim(self) -> int | None:
        return None

    def make_shared(self, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Shared:
        spec = self.spec
        assert spec.max_position_embeddings is not None
        alibi = build_mpt_alibi_tensor(machine, spec.num_attention_heads, spec.max_position_embeddings)
        additive = causal_mask(self, machine, self.embedding_dtype, window=None, detects_packing=False)
        assert additive is not None
        return Shared(alibi=alibi, mask=machine.empty(additive.shape, DType.bool8))

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        hidden, p = self.spec.hidden_size, self.spec.attention_dropout
        norm_1 = build.layer_norm("norm_1", hidden, bias=False)
        attention = self.self_attention(build, shared)
        norm_2 = build.layer_norm("norm_2", hidden, bias=False)
        ffn = self.mlp(build)

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
            layernorm_output = norm_1(hidden_states)
            residual = hidden_states
            attn_outputs, attn_weights = attention(layernorm_output)
            hidden_states = add(dropout(attn_outputs, p), residual)
            layernorm_output = norm_2(hidden_states)
            residual = hidden_states
            output = ffn(layernorm_output, residual)
            return output, attn_weights

        return forward

    def self_attention(self, build: Builder, shared: Shared) -> Attention:
        spec = self.spec
        hidden, heads = spec.hidden_size, spec.num_attention_heads
        qkv_proj = build.linear("attn.Wqkv", hidden, 3 * hidden)
        out_proj = build.linear("attn.out_proj", hidden, hidden)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            mixed_qkv = qkv_proj(x)
            if spec.clip_qkv is not None:
                mixed_qkv = clamp(mixed_qkv, num_bounds=2)
            query, key, value = split_last(mixed_qkv, hidden, hidden, hidden)
            query, key, value = self.heads(query, heads), self.heads(key, heads), self.heads(value, heads)
            copies = x.shape[0] > 1
            square = (*query.shape[:3], key.shape[2])
            attention_scores = mul_number(matmul(query, key, square, copies=(copies, copies)))
            assert shared.alibi is not None and shared.mask is not None
            attention_scores = add(attention_scores, shared.alibi.view(*position_bias(shared.alibi, x.shape[1])))
            attention_scores = masked_fill(attention_scores, shared.mask)
            attn_weights = to(softmax(to(attention_scores, DType.fp32)), value.dtype)
            attn_weights = dropout(attn_weights, spec.attention_dropout)
            context_states = weighted_values(attn_weights, value, by_tokens=True)
            context_states = contiguous(context_states).view(*x.shape)
            attn_output = out_proj(context_states)
            return attn_output, attn_weights

        return forward

    def mlp(self, build: Builder) -> Callable[[Tensor, Tensor], Tensor]:
        spec = self.spec
        up_proj = build.linear("ffn.up_proj", spec.hidden_size, spec.intermediate_size)
        down_proj = build.linear("ffn.down_proj", spec.intermediate_size, spec.hidden_size)
        activation = self.activation()

        def forward(x: Tensor, residual: Tensor) -> Tensor:
            hidden_states = activation(up_proj(x))
            intermediate_output = down_proj(hidden_states)
            output = dropout(intermediate_output, spec.attention_dropout)
            return add(output, residual)

        return forward

    def final_norm(self, build: Builder) -> Norm:
        return build.layer_norm("transformer.norm_f", self.spec.hidden_size, bias=False)


def position_bias(alibi: Tensor, tokens: int) -> tuple[int, int, int]:
    """Shape of the last `tokens` positions of alibi [N, 1, max_seq_len]."""
    return alibi.shape[0], 1, min(tokens, alibi.shape[2])


def build_mpt_alibi_tensor(m: Machine, num_heads: int, max_seq_len: int) -> Tensor:
    """[N, 1, max_seq_len] in fp32 (`build_mpt_alibi_tensor`)."""
    power = 1 << (num_heads - 1).bit_length()
    distances = m.empty((max_seq_len,), DType.int32)
    counted = m.empty((power,), DType.int64)
    base = m.empty((power,), DType.fp32)
    del counted
    base = m.empty((power,), DType.fp32)
    raised = m.empty((power,), DType.fp32)
    slopes = m.empty((power,), DType.fp32)
    del raised
    if power != num_heads:
        slopes = m.empty((power,), DType.fp32)
    alibi = m.empty((num_heads, 1, max_seq_len), DType.fp32)
    del distances, base, slopes
    return alibi
