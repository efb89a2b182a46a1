"""Experts beside an MLP that every token visits, as deepseek_v2, deepseek_v3 and glm4_moe choose and add them.

Source: transformers 5.17 models/deepseek_v2/modeling_deepseek_v2.py, models/deepseek_v3/modeling_deepseek_v3.py,
models/glm4_moe/modeling_glm4_moe.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Mlp
from memplan.architectures.moe import Moe
from memplan.dtypes import DType
from memplan.model_spec import ModelSpec
from memplan.ops.attention import softmax_fp32
from memplan.ops.linear import linear
from memplan.ops.lora_parameter import Active, BareParameter, activated
from memplan.ops.moe import Routing
from memplan.ops.pointwise import add, add_number, mul_number, saves_result, to
from memplan.ops.rows import divide_in_place, flatten_tokens, gather_last, masked_fill, sum_last, topk
from memplan.ops.tensor import Storage, Tensor

Route = Callable[[Tensor], Routing]


class DeepseekMoe(Moe):
    """deepseek_v2's: chosen by a softmax over all experts."""

    router_comes_first = False

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
        return SoftmaxRouter(self.router(build).weight, self.spec)


class SigmoidMoe(DeepseekMoe):
    """deepseek_v3's and glm4_moe's: chosen by sigmoid scores."""

    def route(self, build: Builder) -> Route:
        router = SigmoidRouter(self.router(build).weight, self.spec)
        # loaded in fp32 whatever the rest is (`_keep_in_fp32_modules_strict`)
        build.buffer("mlp.gate.e_score_correction_bias", (self.spec.num_experts,), DType.fp32)
        return router


@dataclass(slots=True)
class SoftmaxRouter:
    """fp32 throughout; with `group_limited_greedy` only the experts of the best groups may be chosen."""

    weight: BareParameter
    spec: ModelSpec

    def __call__(self, hidden_states: Tensor) -> Routing:
        with activated(self.weight) as active:
            return self.choose(hidden_states, active)

    def logits(self, hidden_states: Tensor, active: Active) -> Tensor:
        x = to(flatten_tokens(hidden_states), DType.fp32)
        weight = to(self.weight.read(active), DType.fp32)
        return linear(x, weight, None, weight.shape[0])

    def choose(self, hidden_states: Tensor, active: Active) -> Routing:
        spec = self.spec
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
class SigmoidRouter(SoftmaxRouter):
    """Sigmoid scores; a correction that is no parameter takes part in choosing, not in weighing."""

    def choose(self, hidden_states: Tensor, active: Active) -> Routing:
        spec = self.spec
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
