"""mixtral, qwen3_moe, qwen2_moe, olmoe: llama's attention, and a router with experts in place of the MLP.

Sources: transformers 5.17 models/mixtral/modeling_mixtral.py, models/qwen3_moe/modeling_qwen3_moe.py,
models/qwen2_moe/modeling_qwen2_moe.py, models/olmoe/modeling_olmoe.py.
B batch, S tokens, T = B * S, h hidden.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Mlp
from memplan.architectures.llama import Llama
from memplan.architectures.moe_warnings import has_router_loss, moe_warnings
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.ops.lora_parameter import BareParameter
from memplan.ops.moe import Experts, TopKRouter, gated
from memplan.ops.pointwise import add, clip_in_place, mul, saves_result
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

    def mlp(self, build: Builder, kind: str) -> Mlp:
        return self.sparse_block(build) if kind.endswith("experts") else self.gated_mlp(build)

    def warnings(self) -> list[str]:
        return [*super().warnings(), *moe_warnings(self.spec, self.config)]

    def kept_for_loss(self, router_logits: Tensor) -> None:
        """With `output_router_logits` the load-balancing loss keeps a tensor of the logits' size until the router's
        backward: the logits until the model returns, then their softmax (fp32 under autocast), then its gradient."""
        node = router_logits.node
        if not has_router_loss(self.spec, self.config) or node is None:
            return
        m = router_logits.machine
        kept = m.empty(router_logits.shape, DType.fp32) if m.autocast else router_logits.detach()
        kept.storage.mark("activations")
        node.saved = (*node.saved, kept)

    def sparse_block(self, build: Builder) -> Mlp:
        if self.router_comes_first:
            gate = self.router(build)
            experts = self.experts(build)
        else:
            experts = self.experts(build)
            gate = self.router(build)

        def forward(x: Tensor) -> Tensor:
            hidden_states = flatten_tokens(x)
            router_logits, top_k_weights, top_k_index = gate(hidden_states)
            self.kept_for_loss(router_logits)
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


class OneWindow(Moe):
    """One mask for all layers, that of a sliding window where the config has one."""

    def attention_windows(self) -> dict[str, int | None]:
        window = self.spec.sliding_window
        return {"full_attention": None} if window is None else {"sliding_attention": window}


class Mixtral(OneWindow):
    """The weights of the chosen experts stay fp32 and always sum to one."""

    scores_like_logits = False

    def router(self, build: Builder) -> TopKRouter:
        router = super().router(build)
        router.norm_topk_prob = True
        return router


class Qwen3Moe(OneWindow):
    router_comes_first = False


class Qwen2Moe(Moe):
    """A gated MLP that every token visits stands beside the experts."""

    def attention_windows(self) -> dict[str, int | None]:
        # Both masks are always made; a window of 0 tokens stands for none (`Qwen2MoeConfig.__post_init__`).
        return {"full_attention": None, "sliding_attention": self.spec.sliding_window or 0}

    def sparse_block(self, build: Builder) -> Mlp:
        spec = self.spec
        gate = self.router(build)
        experts = self.experts(build)
        shared_expert = self.gated_mlp(build, spec.shared_expert_intermediate_size, "mlp.shared_expert")
        shared_expert_gate = build.linear("mlp.shared_expert_gate", spec.hidden_size, 1)

        def forward(x: Tensor) -> Tensor:
            hidden_states = flatten_tokens(x)
            shared_expert_output = shared_expert(hidden_states)
            router_logits, routing_weights, selected_experts = gate(hidden_states)
            self.kept_for_loss(router_logits)
            expert_output = experts(hidden_states, selected_experts, routing_weights)
            shared_expert_output = mul(saves_result(shared_expert_gate(hidden_states)), shared_expert_output)
            expert_output = add(expert_output, shared_expert_output)
            return expert_output.view(*x.shape)

        return forward


class Olmoe(Moe):
    """Queries and keys are normalised over all heads at once."""

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        width, kv_width = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        q_proj, k_proj, v_proj, o_proj = self.attention_projections(build)
        q_norm = build.rms_norm("self_attn.q_norm", width)
        k_norm = build.rms_norm("self_attn.k_norm", kv_width)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q = q_norm(q_proj(x))
            k = k_norm(k_proj(x))
            v = v_proj(x)
            if spec.clip_qkv is not None:
                q, k, v = clip_in_place(q), clip_in_place(k), clip_in_place(v)
            q = self.heads(q, spec.num_attention_heads, rotated=rope)
            k = self.heads(k, spec.num_key_value_heads, rotated=rope)
            v = self.heads(v, spec.num_key_value_heads)
            q, k = self.rotate(q, k, shared)
            output, attn_weights = self.attention(q, k, v, shared)
            output = o_proj(output.view(*x.shape[:-1], width))
            return output, attn_weights

        return forward
