"""deepseek_v2 and deepseek_v3: multi-head latent attention; dense layers first, then experts beside a shared MLP.

Source: transformers 5.17 models/deepseek_v2/modeling_deepseek_v2.py, models/deepseek_v3/modeling_deepseek_v3.py.
Keys and values are expanded from their latent for every head before attention, so that training keeps them whole:
queries and keys [B, N, S, nope + rope], and the projection [B, S, N, nope + v] of which the values are a view.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Mlp
from memplan.architectures.moe import Moe
from memplan.architectures.shared import Shared, causal_mask, positions
from memplan.dtypes import DType
from memplan.ops.attention import softmax_fp32, split_heads
from memplan.ops.latent import copy_into, expand_heads, rotate_complex, rotate_interleaved
from memplan.ops.linear import linear
from memplan.ops.lora_parameter import Active, BareParameter, activated
from memplan.ops.moe import Routing
from memplan.ops.pointwise import add, add_number, cat_last, mul_number, saves_result, split_last, to
from memplan.ops.rows import divide_in_place, flatten_tokens, gather_last, masked_fill, sum_last, topk
from memplan.ops.tensor import Machine, Storage, Tensor

Route = Callable[[Tensor], Routing]


class DeepseekV2(Moe):
    router_comes_first = False

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

    def sparse_block(self, build: Builder) -> Mlp:
        spec = self.spec
        experts = self.experts(build)
        gate = self.route(build)
        shared_experts = self.gated_mlp(build, spec.shared_expert_intermediate_size, "mlp.shared_experts")

        def forward(hidden_states: Tensor) -> Tensor:
            residuals = hidden_states
            _, topk_weights, topk_indices = gate(hidden_states)
            hidden_states = flatten_tokens(hidden_states)
            hidden_states = experts(hidden_states, topk_indices, topk_weights).view(*residuals.shape)
            hidden_states = add(hidden_states, shared_experts(residuals))
            return hidden_states  # noqa: RET504  the routed sum dies after the new one is made

        return forward

    def route(self, build: Builder) -> Route:
        return RouterV2(self.router(build).weight, self)


class DeepseekV3(DeepseekV2):
    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None and shared.sin is not None
        return rotate_interleaved(q, k, shared.cos, shared.sin)

    def make_shared(self, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Shared:
        return Shared.computed(self, machine, dtype, position_ids)

    def route(self, build: Builder) -> Route:
        router = RouterV3(self.router(build).weight, self)
        # loaded in fp32 whatever the rest is (`_keep_in_fp32_modules_strict`)
        build.buffer("mlp.gate.e_score_correction_bias", (self.spec.num_experts,), DType.fp32)
        return router


@dataclass(slots=True)
class RouterV2:
    """fp32 throughout; with `group_limited_greedy` only the experts of the best groups may be chosen."""

    weight: BareParameter
    decoder: DeepseekV2

    def __call__(self, hidden_states: Tensor) -> Routing:
        with activated(self.weight) as active:
            return self.choose(hidden_states, active)

    def logits(self, hidden_states: Tensor, active: Active) -> Tensor:
        x = to(flatten_tokens(hidden_states), DType.fp32)
        weight = to(self.weight.read(active), DType.fp32)
        return linear(x, weight, None, weight.shape[0])

    def choose(self, hidden_states: Tensor, active: Active) -> Routing:
        spec = self.decoder.spec
        router_logits = self.logits(hidden_states, active)
        scores = softmax_fp32(router_logits)
        if spec.topk_method != "group_limited_greedy":
            topk_weights, topk_indices = topk(scores, spec.num_experts_per_tok)
        else:
            groups, kept = spec.n_group or 1, spec.topk_group or 1
            group_scores, _ = topk(scores.view(scores.shape[0], groups, -(-scores.shape[1] // groups)), 1)  # max
            del _
            masks = _score_mask(group_scores, kept, scores.shape)
            scores = masked_fill(scores, _others(masks[-1]))
            topk_weights, topk_indices = topk(scores, spec.num_experts_per_tok)
        topk_weights = mul_number(topk_weights)
        return router_logits, topk_weights, topk_indices


@dataclass(slots=True)
class RouterV3(RouterV2):
    """Sigmoid scores; a correction that is no parameter takes part in choosing, not in weighing."""

    def choose(self, hidden_states: Tensor, active: Active) -> Routing:
        spec = self.decoder.spec
        router_logits = self.logits(hidden_states, active)
        scores = saves_result(router_logits)
        num_tokens, num_experts = scores.shape
        bias = Tensor(Storage(scores.machine, 0), (num_experts,), scores.dtype)
        scores_for_choice = add(scores, bias)
        groups, kept = spec.n_group or 1, spec.topk_group or 1
        best, _ = topk(scores_for_choice.view(num_tokens, groups, num_experts // groups), 2)
        del _
        group_scores = sum_last(best)
        del best
        masks = _score_mask(group_scores, kept, scores.shape)
        scores_for_choice = masked_fill(scores_for_choice, _others(masks[-1]))
        topk_indices = topk(scores_for_choice, spec.num_experts_per_tok)[1]
        topk_weights = gather_last(scores, topk_indices)
        if spec.norm_topk_prob:
            denominator = add_number(sum_last(topk_weights))
            topk_weights = divide_in_place(topk_weights, denominator)
        topk_weights = mul_number(topk_weights)
        return router_logits, topk_weights, topk_indices


def _score_mask(group_scores: Tensor, num_kept: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the kept groups, their mask, and that mask by expert."""
    m = group_scores.machine
    scores = group_scores.view(*group_scores.shape[:2])
    group_idx = topk(scores, num_kept)[1]
    group_mask = m.empty(scores.shape, scores.dtype)
    score_mask = m.empty(shape, scores.dtype)
    return group_idx, group_mask, score_mask


def _others(score_mask: Tensor) -> Tensor:
    """~score_mask.bool()"""
    kept = score_mask.machine.empty(score_mask.shape, DType.bool8)
    others = score_mask.machine.empty(score_mask.shape, DType.bool8)
    del kept
    return others


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
