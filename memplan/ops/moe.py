"""A mixture of experts as transformers 5.17 runs it: routers, and experts as 3-D parameters.

`use_experts_implementation` (integrations/moe.py) dispatches to `grouped_mm_experts_forward` where torch has
grouped_mm, as every CUDA build of torch 2.9 and later has. It sorts the tokens by expert and multiplies all of
them at once, so that memory does not depend on which experts the router chooses.

T tokens, K experts a token, N = T * K, E experts, h hidden, I width of one expert. What a layer keeps for backward:

    router      probabilities [T, E] fp32, chosen indices [T, K] int64, weights [T, K]
    dispatch    permutation and its inverse [N] int64, offsets [E] int32, a mask [N, 1] of one byte
    gate and up rows [N, h] if the experts train (or have adapters); result [N, 2I]
    down        gated [N, I] and what the activation saves of it, if they train; result [N, h]
    combine     rows [N, h] and their weights [N, 1], factors of a product
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.ops.attention import softmax_fp32
from memplan.ops.grouped_mm import grouped_mm
from memplan.ops.linear import linear
from memplan.ops.lora_parameter import Active, BareParameter, activated
from memplan.ops.pointwise import add_in_place, mul, split_last, to
from memplan.ops.rows import (
    cumulative_sum,
    divide_in_place,
    index_rows,
    masked_fill,
    masked_fill_in_place,
    sort,
    sum_groups,
    sum_last,
    topk,
)
from memplan.ops.tensor import Machine, Tensor

Gate = Callable[[Tensor], Tensor]
Routing = tuple[Tensor, Tensor, Tensor]
"""Logits [T, E], weights [T, K] and indices [T, K] of the chosen experts."""


@dataclass(slots=True)
class TopKRouter:
    """softmax over all experts in fp32, then the best K of them: weight [E, h].

    `scores_like_logits` casts the weights back to the logits' dtype (all but mixtral), `norm_topk_prob` makes them
    sum to one.
    """

    weight: BareParameter
    top_k: int
    norm_topk_prob: bool
    scores_like_logits: bool = True

    def __call__(self, hidden_states: Tensor) -> Routing:
        with activated(self.weight) as active:
            return self._route(hidden_states, active)

    def _route(self, hidden_states: Tensor, active: Active) -> Routing:
        weight = self.weight.read(active)
        router_logits = linear(hidden_states, weight, None, weight.shape[0])
        del weight
        router_probs = softmax_fp32(router_logits)
        router_top_value, router_indices = topk(router_probs, self.top_k)
        if self.norm_topk_prob:
            router_top_value = divide_in_place(router_top_value, sum_last(router_top_value))
        if self.scores_like_logits:
            router_top_value = to(router_top_value, router_logits.dtype)
        return router_logits, router_top_value, router_indices


@dataclass(slots=True)
class Experts:
    """gate_up_proj [E, 2I, h] and down_proj [E, h, I] in either order, each with an optional bias [E, out].

    `apply_gate` turns [N, 2I] into [N, I].
    """

    num_experts: int
    intermediate_size: int
    gate_up_proj: BareParameter
    down_proj: BareParameter
    apply_gate: Gate
    gate_up_proj_bias: Tensor | None = None
    down_proj_bias: Tensor | None = None

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        with activated(self.down_proj, self.gate_up_proj) as active:
            return _grouped_mm_experts(self, active, hidden_states, top_k_index, top_k_weights)


def gated(activation: Gate) -> Gate:
    """integrations/moe.py `_default_apply_gate`."""

    def apply_gate(gate_up: Tensor) -> Tensor:
        width = gate_up.shape[-1] // 2
        gate, up = split_last(gate_up, width, width)
        return mul(activation(gate), up)

    return apply_gate


def _grouped_mm_experts(
    experts: Experts, active: Active, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """integrations/moe.py `grouped_mm_experts_forward`, its locals in the order in which they die."""
    m = hidden_states.machine
    num_tokens, num_top_k = top_k_index.shape
    num_rows, hidden_dim = num_tokens * num_top_k, hidden_states.shape[-1]
    sample_weights = top_k_weights.view(num_rows, 1)
    expert_ids_g, perm = sort(top_k_index.view(num_rows))
    selected = index_rows(hidden_states, m.empty((num_rows,), DType.int64))  # perm // num_top_k
    sample_weights_g = index_rows(sample_weights, perm)
    histc_input = m.empty((num_rows,), DType.int32)  # noqa: F841  a local of the module: it lives until the return
    tokens_per_expert = m.empty((experts.num_experts,), DType.int32)  # noqa: F841  as well
    offsets = cumulative_sum(m, (experts.num_experts,), DType.int32)
    sentinel_mask = m.empty((num_rows, 1), DType.bool8)
    weight = experts.gate_up_proj.read(active)
    bias = None if experts.gate_up_proj_bias is None else index_rows(experts.gate_up_proj_bias, expert_ids_g)
    selected = masked_fill_in_place(selected, sentinel_mask)
    proj_out = _grouped_linear(selected, weight, offsets, 2 * experts.intermediate_size, bias)
    proj_out = masked_fill(proj_out, sentinel_mask)
    proj_out = experts.apply_gate(proj_out)
    weight = experts.down_proj.read(active)
    bias = None if experts.down_proj_bias is None else index_rows(experts.down_proj_bias, expert_ids_g)
    proj_out = _grouped_linear(proj_out, weight, offsets, hidden_dim, bias)
    proj_out = masked_fill(proj_out, sentinel_mask)
    weighted_out = mul(proj_out, sample_weights_g)
    inv_perm = _inverse(m, num_rows)
    weighted_out = index_rows(weighted_out, inv_perm)
    final_hidden_states = sum_groups(weighted_out, num_tokens)
    return to(final_hidden_states, hidden_states.dtype)


def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
    out = grouped_mm(to(x, weight.dtype), weight, offsets, out_features)
    return out if bias is None else add_in_place(out, bias)


def _inverse(m: Machine, num_rows: int) -> Tensor:
    """inv_perm[perm] = arange(num_rows)"""
    inv_perm = m.empty((num_rows,), DType.int64)
    counted = m.empty((num_rows,), DType.int64)
    del counted
    return inv_perm
