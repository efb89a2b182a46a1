"""gemma4's experts, which every layer has beside its MLP: both are normed, and added.

Source: transformers 5.17 models/gemma4/modeling_gemma4.py `Gemma4TextRouter`, `Gemma4TextExperts`. The router is a
linear layer, which bitsandbytes quantises and PEFT adapts, between a norm and factors of its own; it reads what comes
before the norm of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Norm
from memplan.ops.attention import softmax_fp32
from memplan.ops.lora_parameter import BareParameter
from memplan.ops.moe import Experts, Routing, gated
from memplan.ops.norm import PowRMSNorm
from memplan.ops.pointwise import mul, mul_number
from memplan.ops.rows import divide_in_place, index_elements, sum_last, topk
from memplan.ops.tensor import Parameter, Tensor

if TYPE_CHECKING:
    from memplan.architectures.gemma4 import Gemma4


@dataclass(slots=True)
class Router:
    """softmax over all experts in fp32, the best K made to sum to one, times a factor of each expert."""

    scale: Parameter
    per_expert_scale: Parameter
    proj: Callable[[Tensor], Tensor]
    top_k: int

    def __call__(self, hidden_states: Tensor) -> Routing:
        hidden_states = PowRMSNorm(None)(hidden_states)
        hidden_states = mul_number(mul(hidden_states, self.scale))
        expert_scores = self.proj(hidden_states)
        router_probabilities = softmax_fp32(expert_scores)
        top_k_weights, top_k_index = topk(router_probabilities, self.top_k)
        top_k_weights = divide_in_place(top_k_weights, sum_last(top_k_weights))
        top_k_weights = mul(top_k_weights, index_elements(self.per_expert_scale, top_k_index))
        return router_probabilities, top_k_weights, top_k_index


def router_of(build: Builder) -> Router:
    spec = build.spec
    scale = build.parameter("router.scale", (spec.hidden_size,))
    per_expert_scale = build.parameter("router.per_expert_scale", (spec.num_experts,))
    proj = build.linear("router.proj", spec.hidden_size, spec.num_experts)
    return Router(scale, per_expert_scale, proj, spec.num_experts_per_tok)


@dataclass(slots=True)
class ExpertsBlock:
    """What a layer has under `enable_moe_block`."""

    router: Router
    experts: Experts
    post_mlp_norm: Norm
    """`post_feedforward_layernorm_1`, after the MLP."""
    post_norm: Norm
    """`post_feedforward_layernorm_2`, after the experts."""
    pre_norm: Norm
    """`pre_feedforward_layernorm_2`, before the experts."""


def experts_of(decoder: Gemma4, build: Builder) -> ExpertsBlock:
    spec = build.spec
    num_experts, hidden, width = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    router = router_of(build)
    gate_up_proj = BareParameter(build.parameter("experts.gate_up_proj", (num_experts, 2 * width, hidden)))
    down_proj = BareParameter(build.parameter("experts.down_proj", (num_experts, hidden, width)))
    experts = Experts(num_experts, width, gate_up_proj, down_proj, gated(decoder.activation()))
    names = "post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"
    return ExpertsBlock(router, experts, *[decoder.norm(build, name, hidden) for name in names])
