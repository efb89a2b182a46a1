"""llama4's experts: every expert multiplies every token, by scores that are zero where the router did not choose it.

Source: transformers 5.17 models/llama4/modeling_llama4.py `Llama4TextMoe`, `Llama4TextExperts`, `Llama4Router`.
T tokens, E experts, h hidden, I width of one expert, d bytes an element. What a layer keeps for backward:

    router          logits [T, E] go with the layer; indices [T, K] int64; sigmoid's fp32 result [T, E]
    hidden states   repeated [E T, h] for the scores' gradient; times the scores, if the experts train
    scores          by expert [E, T]
    experts         gate and up [E, T, 2I], the activation [E, T, I]; their product, if the experts train
    under autocast  the experts cast to bf16, unless they are: kept until backward

The router is a subclass of nn.Linear: bitsandbytes passes it over (integrations/bitsandbytes.py asks for the class
itself), and PEFT adapts it (tuners/tuners_utils.py `_maybe_include_all_linear_layers`), which fails where it is called,
since it returns two tensors (tuners/lora/layer.py `Linear.forward`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Mlp
from memplan.dtypes import DType
from memplan.errors import MemplanError
from memplan.ops.linear import bmm, linear
from memplan.ops.pointwise import add_in_place, clone, expand_copy, mul, saves_result, split_last, to
from memplan.ops.rows import flatten_tokens, scatter_in_place, sum_groups, topk
from memplan.ops.tensor import Parameter, Tensor

SparseMlp = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states [T, h], and the router's logits [T, E]."""
PREFIX = "feed_forward"


@dataclass(slots=True)
class Router:
    """The best K logits through a sigmoid, zero for the other experts: scores and logits [T, E]."""

    weight: Parameter
    top_k: int

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        router_logits = linear(hidden_states, self.weight, None, self.weight.shape[0])
        router_top_value, router_indices = topk(router_logits, self.top_k)
        router_scores = router_logits.machine.empty(router_logits.shape, router_logits.dtype)  # minus infinity
        router_scores = scatter_in_place(router_scores, router_indices, router_top_value)
        router_scores = to(saves_result(to(router_scores, DType.fp32)), router_scores.dtype)
        return router_scores, router_logits


@dataclass(slots=True)
class Experts:
    """gate_up_proj [E, h, 2I] and down_proj [E, I, h] over hidden states [E T, h]."""

    gate_up_proj: Parameter
    down_proj: Parameter
    activation: Mlp

    def __call__(self, hidden_states: Tensor) -> Tensor:
        num_experts, width, hidden = self.down_proj.shape
        tokens = hidden_states.shape[0] // num_experts
        hidden_states = hidden_states.view(num_experts, tokens, hidden)
        gate_up = bmm(hidden_states, self.gate_up_proj, (num_experts, tokens, 2 * width))
        gate, up = split_last(gate_up, width, width)
        next_states = bmm(mul(up, self.activation(gate)), self.down_proj, hidden_states.shape)
        return next_states.view(num_experts * tokens, hidden)


def sparse_mlp(
    build: Builder, shared_expert: Callable[[Builder], Mlp], activation: Callable[[Tensor], Tensor]
) -> SparseMlp:
    """`Llama4TextMoe`; `shared_expert` builds the MLP that stands beside the experts.

    Raises:
        MemplanError: an adapter on the router, which fails.
    """
    spec = build.spec
    num_experts, hidden, width = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
    gate_up_proj = build.parameter(f"{PREFIX}.experts.gate_up_proj", (num_experts, hidden, 2 * width))
    down_proj = build.parameter(f"{PREFIX}.experts.down_proj", (num_experts, width, hidden))
    experts = Experts(gate_up_proj, down_proj, activation)
    router = Router(_router_weight(build), spec.num_experts_per_tok)
    beside = shared_expert(build)

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden_states = flatten_tokens(hidden_states)
        tokens = hidden_states.shape[0]
        router_scores, router_logits = router(hidden_states)
        routed_in = expand_copy(hidden_states, (num_experts * tokens, hidden))
        routed_in = mul(routed_in, _by_expert(router_scores))
        routed_out = experts(routed_in)
        out = beside(hidden_states)
        out = add_in_place(out, sum_groups(routed_out, tokens))
        return out, router_logits

    return forward


def _by_expert(router_scores: Tensor) -> Tensor:
    """router_scores.transpose(0, 1).reshape(-1, 1)"""
    tokens, num_experts = router_scores.shape
    spread = router_scores if 1 in (tokens, num_experts) else clone(router_scores)
    return spread.view(num_experts * tokens, 1)


def _router_weight(build: Builder) -> Parameter:
    spec, name, config = build.spec, f"{PREFIX}.router", build.config
    if config.target_modules != "all-linear" and build.is_target(name) and not build.saves(name):
        raise MemplanError(
            f"PEFT's adapter of `{name}` fails when it is called: that router returns two tensors",
            hints=["leave `router` out of `target_modules`"],
        )
    (weight,) = build.own(name, ("weight", (spec.num_experts, spec.hidden_size)))
    return weight
