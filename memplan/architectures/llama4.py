"""llama4_text: rotation by complex numbers, attention in chunks and layers without rotation, experts on every token.

Source: transformers 5.17 models/llama4/modeling_llama4.py. What is special for memory:
- queries and keys are rotated as complex numbers, in fp32 (ops/rotary_complex.py), and then normed without weights;
- most layers attend within chunks of `attention_chunk_size` tokens: from that many on they have a mask [B, 1, S, S];
- the others do not rotate; with temperature tuning their queries are multiplied by fp32 factors, which makes one more
  tensor of them, and the factors [S] are kept;
- eager attention's softmax runs in the dtype of the scores;
- what attention returns is held until the layer returns; experts: llama4_moe.py.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Layer, Mlp, Norm
from memplan.architectures.llama4_moe import PREFIX, sparse_mlp
from memplan.architectures.llama4_warnings import llama4_warnings
from memplan.architectures.moe import Moe
from memplan.architectures.shared import Shared, shifted_range
from memplan.architectures.smollm3 import SmolLM3
from memplan.dtypes import DType
from memplan.ops.attention import split_heads
from memplan.ops.norm import CastRMSNorm
from memplan.ops.pointwise import add, mul, to
from memplan.ops.rotary_complex import apply_rotary_complex, complex_table
from memplan.ops.tensor import Machine, Tensor


class Llama4(Moe, SmolLM3):
    softmax_in_fp32 = False
    casts_probabilities = False

    def warnings(self) -> list[str]:
        return [*super().warnings(), *llama4_warnings(self.spec, self.config)]

    def attention_windows(self) -> dict[str, int | None]:
        return {"full_attention": None, "chunked_attention": self.spec.attention_chunk_size}

    def rotary_table(self, machine: Machine, width: int, dtype: DType) -> tuple[Tensor, Tensor | None]:
        return complex_table(machine, self.config.seq_len, width), None

    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return CastRMSNorm(*build.own(name, ("weight", (width,))))

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        hidden = self.spec.hidden_size
        attention = self.self_attention(build, shared, rope=self.has_rope(kind))
        is_moe_layer = kind.endswith("experts")
        mlp = None if is_moe_layer else self.gated_mlp(build, prefix=PREFIX)
        sparse = sparse_mlp(build, self.shared_expert, self.activation()) if is_moe_layer else None
        norm = self.norm(build, "input_layernorm", hidden)
        post_norm = self.norm(build, "post_attention_layernorm", hidden)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            _: Tensor | None
            attention_states, _ = attention(hidden_states)
            hidden_states = add(residual, attention_states)
            residual = hidden_states
            hidden_states = post_norm(hidden_states)
            if sparse is not None:
                hidden_states, _ = sparse(hidden_states)  # in `_` the router's logits follow the probabilities
            elif mlp is not None:
                hidden_states = mlp(hidden_states)
            hidden_states = add(residual, hidden_states.view(*residual.shape))
            return hidden_states  # noqa: RET504  as in llama

        return forward

    def shared_expert(self, build: Builder) -> Mlp:
        return self.gated_mlp(build, self.spec.shared_expert_intermediate_size, f"{PREFIX}.shared_expert")

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        width = spec.num_attention_heads * spec.head_dim
        q_proj, k_proj, v_proj, o_proj = self.attention_projections(build)
        qk_norm = CastRMSNorm(None) if spec.qk_norm and rope else None
        tunes = spec.attn_temperature_tuning and not rope

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q = q_proj(x)
            q_by_heads = self.gradient_comes_by_heads(q, spec.num_attention_heads, shared)
            q = split_heads(q, spec.num_attention_heads, spec.head_dim, copies=q_by_heads and not rope)
            k = k_proj(x)
            k_by_heads = self.gradient_comes_by_heads(k, spec.num_key_value_heads, shared)
            k = split_heads(k, spec.num_key_value_heads, spec.head_dim, copies=k_by_heads and not rope)
            v = self.heads(v_proj(x), spec.num_key_value_heads, shared)
            assert shared.cos is not None
            if rope:
                q, k = apply_rotary_complex(q, k, shared.cos, copies=(q_by_heads, k_by_heads))
            if qk_norm is not None:
                q = qk_norm(q)
                k = qk_norm(k)
            if tunes:
                positions = shifted_range(x.machine, x.shape[1])
                attn_scales = attention_scales(positions)
                q = to(mul(q, attn_scales), q.dtype)
            output, attn_weights = self.attention(q, k, v, shared)
            output = output.view(*x.shape[:-1], width)
            output = o_proj(output)
            return output, attn_weights

        return forward


def attention_scales(positions: Tensor) -> Tensor:
    """log1p(floor((positions + 1) / floor_scale)) * attn_scale + 1 in fp32, [1, 1, S, 1]."""
    m = positions.machine
    scales = m.empty((1, 1, positions.numel, 1), DType.fp32)
    for _ in range(6):  # each of the operations makes a tensor of its own
        scales = m.empty(scales.shape, DType.fp32)
    return scales
