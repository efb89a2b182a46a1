"""deepseek_v2 and deepseek_v3: multi-head latent attention; dense layers first, then experts (deepseek_moe.py).

Source: transformers 5.17 models/deepseek_v2/modeling_deepseek_v2.py, models/deepseek_v3/modeling_deepseek_v3.py.
Keys and values are expanded from their latent for every head before attention, so that training keeps them whole:
queries and keys [B, N, S, nope + rope], and the projection [B, S, N, nope + v] of which the values are a view.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Mlp
from memplan.architectures.deepseek_moe import DeepseekMoe, SigmoidMoe
from memplan.architectures.llama import Llama
from memplan.architectures.shared import Shared, causal_mask, positions
from memplan.dtypes import DType
from memplan.ops.attention import split_heads
from memplan.ops.latent import copy_into, expand_heads, rotate_complex, rotate_interleaved
from memplan.ops.pointwise import cat_last, split_last
from memplan.ops.tensor import Machine, Tensor


class LatentAttention(Llama):
    """Multi-head latent attention; how pairs are rotated is the model's."""

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        hidden, heads = spec.hidden_size, spec.num_attention_heads
        nope, rope_dim, v_dim = spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim
        queries = self.query_projection(build)
        latent = spec.kv_lora_rank
        kv_a_proj = build.linear("self_attn.kv_a_proj_with_mqa", hidden, latent + rope_dim, bias=spec.attention_bias)
        kv_a_layernorm = build.rms_norm("self_attn.kv_a_layernorm", latent)
        kv_b_proj = build.linear("self_attn.kv_b_proj", latent, heads * (nope + v_dim))
        o_proj = build.linear("self_attn.o_proj", heads * v_dim, hidden, bias=spec.attention_out_bias)

        def expand_kv(k_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
            batch, _, tokens, _ = k_nope.shape
            kv = kv_b_proj(k_nope).view(batch, tokens, heads * (nope + v_dim))
            kv = split_heads(kv, heads, nope + v_dim, copies=True)
            k_nope, value_states = split_last(kv, nope, v_dim)
            k_rot = expand_heads(k_rot, heads)
            key_states = kv.machine.empty((batch, heads, tokens, nope + rope_dim), kv.dtype)
            key_states = copy_into(key_states, k_nope)
            key_states = copy_into(key_states, k_rot)
            return key_states, value_states

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            batch, tokens, _ = x.shape
            q = split_heads(queries(x), heads, nope + rope_dim, copies=True)
            q_nope, q_pe = split_last(q, nope, rope_dim)
            compressed_kv = kv_a_proj(x)
            kv_nope, k_pe = split_last(compressed_kv, latent, rope_dim)
            k_nope = kv_a_layernorm(kv_nope).view(batch, 1, tokens, latent)
            k_pe = k_pe.view(batch, 1, tokens, rope_dim)
            q_pe, k_pe = self.rotate(q_pe, k_pe, shared)
            query_states = cat_last([q_nope, q_pe])
            key_states, value_states = expand_kv(k_nope, k_pe)
            output, attn_weights = self.attention(query_states, key_states, value_states, shared, by_heads=True)
            output = o_proj(output.view(batch, tokens, heads * v_dim))
            return output, attn_weights

        return forward

    def query_projection(self, build: Builder) -> Mlp:
        spec = self.spec
        width = spec.num_attention_heads * spec.qk_head_dim
        if spec.q_lora_rank is None:
            q_proj = build.linear("self_attn.q_proj", spec.hidden_size, width)
            return lambda x: q_proj(x)
        q_a_proj = build.linear("self_attn.q_a_proj", spec.hidden_size, spec.q_lora_rank, bias=spec.attention_bias)
        q_a_layernorm = build.rms_norm("self_attn.q_a_layernorm", spec.q_lora_rank)
        q_b_proj = build.linear("self_attn.q_b_proj", spec.q_lora_rank, width)
        return lambda x: q_b_proj(q_a_layernorm(q_a_proj(x)))


class DeepseekV2(LatentAttention, DeepseekMoe):
    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None
        return rotate_complex(q, k, shared.cos)

    def make_shared(self, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Shared:
        """One table of complex frequencies [1, S, R / 2], here as pairs of fp32."""
        tokens, shared = self.config.seq_len, Shared()
        shared.position_ids = positions(machine, tokens)
        shared.mask = causal_mask(self, machine, dtype, window=None)
        shared.cos = complex_rotary_table(machine, tokens, self.spec.qk_rope_head_dim)
        return shared


class DeepseekV3(LatentAttention, SigmoidMoe):
    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None and shared.sin is not None
        return rotate_interleaved(q, k, shared.cos, shared.sin)


def complex_rotary_table(m: Machine, tokens: int, width: int) -> Tensor:
    """exp(i * angle) [1, S, R / 2] as pairs of fp32 (`DeepseekV2RotaryEmbedding`)."""
    angles, pairs = (1, 1, tokens, width // 2), (1, 1, tokens, width)
    position_ids = m.empty((1, 1, tokens), DType.fp32)
    frequencies = m.empty(angles, DType.fp32)
    m.calls("cublas")
    ones = m.empty(angles, DType.fp32)
    polar = m.empty(pairs, DType.fp32)
    del ones
    scaled = m.empty(pairs, DType.fp32)
    del polar, position_ids, frequencies
    return scaled
