"""llama, and qwen2 and qwen3, which differ by little: RMSNorm, rotary attention with grouped keys, gated MLP.

Sources: transformers 5.17 models/llama/modeling_llama.py; models/qwen2/modeling_qwen2.py adds q/k/v biases and layers
with a sliding window; models/qwen3/modeling_qwen3.py norms q and k by head, so that they reach the rotary embedding
from the norm.
"""

from __future__ import annotations

from memplan.architectures.builder import AnyLinear, Builder
from memplan.architectures.decoder import Attention, Decoder, Layer, Mlp, Norm
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import add, mul
from memplan.ops.tensor import Tensor


class Llama(Decoder):
    output_name = "o_proj"
    """What attention's last projection is called."""
    norms_heads_last = False
    """Queries and keys are normed when all three projections are made, not each at once."""

    def norm(self, build: Builder, name: str, width: int) -> Norm:
        """The family's norm over `width`, with weights named `name`."""
        return build.rms_norm(name, width)

    def head_norm(self, build: Builder, name: str, num_heads: int) -> Norm:
        """The norm of queries or keys by head, [B, num_heads, S, head_dim]."""
        return self.norm(build, name, self.spec.head_dim)

    def has_rope(self, kind: str) -> bool:
        """Whether layers of `kind` rotate queries and keys."""
        return True

    def final_norm(self, build: Builder) -> Norm:
        return self.norm(build, "model.norm", self.spec.hidden_size)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        attention = self.self_attention(build, shared, rope=self.has_rope(kind))
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", self.spec.hidden_size)
        post_norm = self.norm(build, "post_attention_layernorm", self.spec.hidden_size)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states, _ = attention(hidden_states)
            hidden_states = add(residual, hidden_states)
            residual = hidden_states
            hidden_states = post_norm(hidden_states)
            hidden_states = mlp(hidden_states)
            hidden_states = add(residual, hidden_states)
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward

    def mlp(self, build: Builder, kind: str) -> Mlp:
        return self.gated_mlp(build)

    def attention_projections(self, build: Builder) -> tuple[AnyLinear, AnyLinear, AnyLinear, AnyLinear]:
        """Of queries, keys and values, each by its heads, and of what attention puts out."""
        spec = self.spec
        hidden, width = spec.hidden_size, spec.num_attention_heads * spec.head_dim
        kv_width = spec.num_key_value_heads * spec.head_dim
        q_proj = build.linear("self_attn.q_proj", hidden, width, bias=spec.attention_bias)
        k_proj = build.linear("self_attn.k_proj", hidden, kv_width, bias=spec.attention_bias)
        v_proj = build.linear("self_attn.v_proj", hidden, kv_width, bias=spec.attention_bias)
        o_proj = build.linear(f"self_attn.{self.output_name}", width, hidden, bias=spec.attention_out_bias)
        return q_proj, k_proj, v_proj, o_proj

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        width = spec.num_attention_heads * spec.head_dim
        q_proj, k_proj, v_proj, o_proj = self.attention_projections(build)
        q_norm = self.head_norm(build, "self_attn.q_norm", spec.num_attention_heads) if spec.qk_norm else None
        k_norm = self.head_norm(build, "self_attn.k_norm", spec.num_key_value_heads) if spec.qk_norm else None

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q = self.heads(q_proj(x), spec.num_attention_heads, shared, rotated=rope)
            if q_norm is not None and not self.norms_heads_last:
                q = q_norm(q)
            k = self.heads(k_proj(x), spec.num_key_value_heads, shared, rotated=rope)
            if k_norm is not None and not self.norms_heads_last:
                k = k_norm(k)
            v = self.heads(v_proj(x), spec.num_key_value_heads, shared)
            if q_norm is not None and k_norm is not None and self.norms_heads_last:
                q = q_norm(q)
                k = k_norm(k)
            if rope:
                q, k = self.rotate(q, k, shared)
            # a partial rotation ends in a concatenation, which lies by heads
            by_heads = rope and self.rotary_dim() != spec.head_dim
            output, attn_weights = self.attention(q, k, v, shared, by_heads=by_heads)
            output = output.view(*x.shape[:-1], width)
            output = o_proj(output)
            return output, attn_weights

        return forward

    def gated_mlp(
        self,
        build: Builder,
        intermediate_size: int | None = None,
        prefix: str = "mlp",
        *,
        quantises_down_proj: bool = True,
    ) -> Mlp:
        spec = self.spec
        hidden, width = spec.hidden_size, intermediate_size or spec.intermediate_size
        gate_proj = build.linear(f"{prefix}.gate_proj", hidden, width, bias=spec.mlp_bias)
        up_proj = build.linear(f"{prefix}.up_proj", hidden, width, bias=spec.mlp_bias)
        down_proj = build.linear(f"{prefix}.down_proj", width, hidden, bias=spec.mlp_bias, quantise=quantises_down_proj)
        activation = self.activation()

        def forward(x: Tensor) -> Tensor:
            return down_proj(mul(activation(gate_proj(x)), up_proj(x)))

        return forward
