"""mixtral, qwen3_moe, qwen2_moe, olmoe: llama's attention, and a router with experts in place of the MLP.

Sources: transformers 5.17 models/mixtral/modeling_mixtral.py, models/qwen3_moe/modeling_qwen3_moe.py,
models/qwen2_moe/modeling_qwen2_moe.py, models/olmoe/modeling_olmoe.py.
B batch, S tokens, T = B * S, h hidden.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Layer
from memplan.architectures.llama import Llama
from memplan.ops.lora_parameter import BareParameter
from memplan.ops.moe import Experts, TopKRouter, gated
from memplan.ops.rows import flatten_tokens
from memplan.ops.tensor import Tensor


class Moe(Llama):
    """What the families share; dense layers among the sparse ones are llama's."""

    scores_like_logits = True
    router_comes_first = True
    """The router is registered before the experts."""

    def layer_kind(self, index: int) -> str:
        kind = super().layer_kind(index)
        return f"{kind} with experts" if self.spec.is_moe_layer(index) else kind

    def mlp(self, build: Builder, kind: str) -> Layer:
        return self.sparse_block(build) if kind.endswith("experts") else self.gated_mlp(build)

    def sparse_block(self, build: Builder) -> Layer:
        if self.router_comes_first:
            gate = self.router(build)
            experts = self.experts(build)
        else:
            experts = self.experts(build)
            gate = self.router(build)

        def forward(x: Tensor) -> Tensor:
            hidden_states = flatten_tokens(x)
            _, top_k_weights, top_k_index = gate(hidden_states)
            hidden_states = experts(hidden_states, top_k_index, top_k_weights)
            return hidden_states.view(*x.shape)

        return forward

    def router(self, build: Builder) -> TopKRouter:
        spec = self.spec
        weight = BareParameter(build.parameter("mlp.gate.weight", (spec.num_experts, spec.hidden_size)))
        build.adapt(weight)
        return TopKRouter(weight, spec.num_experts_per_tok, spec.norm_topk_prob, self.scores_like_logits)

    def experts(self, build: Builder) -> Experts:
        spec = self.spec
        num_experts, hidden, width = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
        gate_up_proj = BareParameter(build.parameter("mlp.experts.gate_up_proj", (num_experts, 2 * width, hidden)))
        down_proj = BareParameter(build.parameter("mlp.experts.down_proj", (num_experts, hidden, width)))
        build.adapt(gate_up_proj, down_proj)
        return Experts(num_experts, width, gate_up_proj, down_proj, gated(self.activation()))


class Mixtral(Moe):
    """The weights of the chosen experts stay fp32 and always sum to one."""

    scores_like_logits = False

    def attention_windows(self) -> dict[str, int | None]:
        window = self.spec.sliding_window
        return {"full_attention": None} if window is None else {"sliding_attention": window}

    def router(self, build: Builder) -> TopKRouter:
        router = super().router(build)
        router.norm_topk_prob = True
        return router
