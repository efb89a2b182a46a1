"""gpt_oss: eager attention with sinks, every layer a mixture of experts whose projections have biases.

Source: transformers 5.17 models/gpt_oss/modeling_gpt_oss.py. The family has no sdpa: scores [B, N, S, S + 1] are kept
for every layer. PEFT 0.21.2 adapts neither router nor experts, whatever `target_modules` says.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Layer, Norm
from memplan.architectures.moe import Moe
from memplan.architectures.shared import Shared, causal_mask, positions
from memplan.dtypes import DType
from memplan.ops.clamp import clamp
from memplan.ops.linear import linear
from memplan.ops.lora_parameter import BareParameter
from memplan.ops.moe import Experts, Routing
from memplan.ops.norm import LateCastRMSNorm
from memplan.ops.pointwise import add, add_number, mul, mul_number, saves_result, slice_last
from memplan.ops.rows import flatten_tokens, topk
from memplan.ops.sink_attention import rotate_halves, sink_attention, softmax_in_dtype
from memplan.ops.tensor import Machine, Parameter, Tensor


@dataclass(slots=True)
class Router:
    """The best K logits, and softmax over those alone."""

    weight: Parameter
    bias: Parameter
    top_k: int

    def __call__(self, hidden_states: Tensor) -> Routing:
        router_logits = linear(hidden_states, self.weight, self.bias, self.weight.shape[0])
        router_top_value, router_indices = topk(router_logits, self.top_k)
        router_scores = softmax_in_dtype(router_top_value)
        return router_logits, router_scores, router_indices


class GptOss(Moe):
    supports_sdpa = False

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        attention = self.self_attention(build, shared)
        mlp = self.routed_mlp(build)
        norm = self.norm(build, "input_layernorm", self.spec.hidden_size)
        post_norm = self.norm(build, "post_attention_layernorm", self.spec.hidden_size)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states, _ = attention(hidden_states)
            hidden_states = add(residual, hidden_states)
            residual = hidden_states
            hidden_states = post_norm(hidden_states)
            hidden_states, _ = mlp(hidden_states)  # in `_` the routing weights follow the probabilities
            hidden_states = add(residual, hidden_states)
            return hidden_states  # noqa: RET504  as in llama

        return forward

    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return LateCastRMSNorm(build.parameter(f"{name}.weight", (width,)))

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        width = spec.num_attention_heads * spec.head_dim
        sinks = build.parameter("self_attn.sinks", (spec.num_attention_heads,))
        q_proj, k_proj, v_proj, o_proj = self.attention_projections(build)
        groups, p = spec.num_attention_heads // spec.num_key_value_heads, spec.attention_dropout

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q = self.heads(q_proj(x), spec.num_attention_heads, rotated=True)
            k = self.heads(k_proj(x), spec.num_key_value_heads, rotated=True)
            v = self.heads(v_proj(x), spec.num_key_value_heads, rotated=groups > 1)
            assert shared.cos is not None and shared.sin is not None
            q, k = self.rotate(q, k, shared)
            output, attn_weights = sink_attention(q, k, v, sinks, mask=shared.mask, num_groups=groups, p=p)
            output = o_proj(output.view(*x.shape[:-1], width))
            return output, attn_weights

        return forward

    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None and shared.sin is not None
        q_embed = rotate_halves(q, shared.cos, shared.sin)
        k_embed = rotate_halves(k, shared.cos, shared.sin)
        return q_embed, k_embed

    def routed_mlp(self, build: Builder) -> Attention:
        spec = self.spec
        shape = spec.num_experts, spec.hidden_size
        weight, bias = build.parameter("mlp.router.weight", shape), build.parameter("mlp.router.bias", shape[:1])
        router = Router(weight, bias, spec.num_experts_per_tok)
        experts = self.experts(build)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            hidden_states = flatten_tokens(x)
            router_logits, router_scores, router_indices = router(hidden_states)
            self.kept_for_loss(router_logits)
            hidden_states = experts(hidden_states, router_indices, router_scores)
            return hidden_states.view(*x.shape), router_scores

        return forward

    def experts(self, build: Builder) -> Experts:
        spec = self.spec
        num_experts, hidden, width = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
        gate_up_proj = build.parameter("mlp.experts.gate_up_proj", (num_experts, hidden, 2 * width))
        gate_up_bias = build.parameter("mlp.experts.gate_up_proj_bias", (num_experts, 2 * width))
        down_proj = build.parameter("mlp.experts.down_proj", (num_experts, width, hidden))
        down_bias = build.parameter("mlp.experts.down_proj_bias", (num_experts, hidden))
        return Experts(
            num_experts,
            width,
            BareParameter(gate_up_proj),
            BareParameter(down_proj),
            apply_gate,
            gate_up_bias,
            down_bias,
        )

    def make_shared(self, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Shared:
        """Both masks always; rotary tables of half the head."""
        tokens, shared = self.config.seq_len, Shared()
        shared.position_ids = positions(machine, tokens)
        shared.mask = causal_mask(self, machine, dtype, window=None, detects_packing=False)
        window = self.spec.sliding_window
        shared.sliding_mask = causal_mask(self, machine, dtype, window=window, detects_packing=False)
        shared.cos, shared.sin = rotary_table(machine, tokens, self.spec.head_dim, dtype)
        return shared


def apply_gate(gate_up: Tensor) -> Tensor:
    """modeling_gpt_oss.py `GptOssExperts._apply_gate`: gate and up interleaved, both clamped."""
    width = gate_up.shape[-1] // 2
    gate, up = slice_last(gate_up, width), slice_last(gate_up, width)
    gate = clamp(gate, num_bounds=1)
    up = clamp(up, num_bounds=2)
    glu = mul(gate, saves_result(mul_number(gate)))
    return mul(add_number(up), glu)


def rotary_table(m: Machine, tokens: int, head_dim: int, dtype: DType) -> tuple[Tensor, Tensor]:
    """cos and sin [1, 1, S, H / 2] in `dtype`, computed in fp32 (`GptOssRotaryEmbedding`)."""
    shape = (1, 1, tokens, head_dim // 2)
    positions = m.empty((1, 1, tokens), DType.fp32)
    frequencies = m.empty(shape, DType.fp32)
    m.calls("cublas")
    cosine = m.empty(shape, DType.fp32)
    cos = m.empty(shape, DType.fp32)
    del cosine
    sine = m.empty(shape, DType.fp32)
    sin = m.empty(shape, DType.fp32)
    del sine
    if dtype is not DType.fp32:
        cast = m.empty(shape, dtype), m.empty(shape, dtype)
        del positions, frequencies
        cos, sin = cast
    return cos, sin
