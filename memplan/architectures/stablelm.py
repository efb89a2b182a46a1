"""stablelm: LayerNorm with bias, a part of each head rotated, gated MLP; attention and MLP side by side or in turn.

Source: transformers 5.17 models/stablelm/modeling_stablelm.py. What is special for memory: the rotated part of the head
is concatenated with the rest, so that q and k lie by heads and attention's result is copied once more; 12b norms each
head of q and k apart.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Layer, Mlp, Norm
from memplan.architectures.llama import Llama
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import add, cat_last, dropout, slice_last, split_last
from memplan.ops.rotary import apply_rotary
from memplan.ops.tensor import Tensor


class StableLm(Llama):
    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return build.layer_norm(name, width)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        spec = self.spec
        attention = self.self_attention(build, shared)
        mlp = self.gated_mlp(build)
        norm = self.norm(build, "input_layernorm", spec.hidden_size)
        p = spec.hidden_dropout
        if spec.parallel_residual:

            def side_by_side(hidden_states: Tensor) -> Tensor:
                residual = hidden_states
                hidden_states = norm(hidden_states)
                self_attn_output, _ = attention(hidden_states)
                mlp_output = mlp(hidden_states)
                mlp_output = dropout(mlp_output, p)
                hidden_states = add(add(residual, self_attn_output), mlp_output)
                return hidden_states  # noqa: RET504  the old one dies after it, as in the module

            return side_by_side
        post_norm = self.norm(build, "post_attention_layernorm", spec.hidden_size)

        def in_turn(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            self_attn_output, _ = attention(hidden_states)
            residual = add(residual, self_attn_output)
            mlp_output = mlp(post_norm(residual))
            mlp_output = dropout(mlp_output, p)
            hidden_states = add(residual, mlp_output)
            return hidden_states  # noqa: RET504  the old one dies after it, as in the module

        return in_turn

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        width = spec.num_attention_heads * spec.head_dim
        q_proj, k_proj, v_proj, o_proj = self.attention_projections(build)
        q_norm = self.head_norm(build, "self_attn.q_layernorm", spec.num_attention_heads) if spec.qk_norm else None
        k_norm = self.head_norm(build, "self_attn.k_layernorm", spec.num_key_value_heads) if spec.qk_norm else None

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q, k, v = self.seen_by_heads(x, q_proj, k_proj, v_proj)
            if q_norm is not None and k_norm is not None:
                q = q_norm(q)
                k = k_norm(k)
            assert shared.cos is not None and shared.sin is not None
            # The four names hold the projections and what was rotated until the module returns.
            rotary_ndims = shared.cos.shape[-1]
            q_rot, q_pass = slice_last(q, rotary_ndims), slice_last(q, spec.head_dim - rotary_ndims)
            k_rot, k_pass = slice_last(k, rotary_ndims), slice_last(k, spec.head_dim - rotary_ndims)
            q_rot, k_rot = apply_rotary(q_rot, k_rot, shared.cos, shared.sin)
            q = cat_last([q_rot, q_pass])
            k = cat_last([k_rot, k_pass])
            attn_output, attn_weights = self.attention(q, k, v, shared, by_heads=True)
            attn_output = attn_output.view(*x.shape[:-1], width)
            attn_output = o_proj(attn_output)
            return attn_output, attn_weights

        return forward

    def seen_by_heads(self, x: Tensor, q_proj: Mlp, k_proj: Mlp, v_proj: Mlp) -> tuple[Tensor, Tensor, Tensor]:
        """All are projected first, then all viewed: backward takes the views in turn before the products."""
        heads, kv_heads = self.spec.num_attention_heads, self.spec.num_key_value_heads
        q, k, v = q_proj(x), k_proj(x), v_proj(x)
        q, k = self.heads(q, heads, rotated=True), self.heads(k, kv_heads, rotated=True)
        return q, k, self.heads(v, kv_heads)

    def head_norm(self, build: Builder, name: str, num_heads: int) -> Norm:
        """Each head is normed apart, by its own LayerNorm, and all are concatenated (`StableLmLayerNormPerHead`)."""
        width = self.spec.head_dim
        norms = [build.layer_norm(f"{name}.norms.{i}", width, bias=False, strided=True) for i in range(num_heads)]

        def forward(x: Tensor) -> Tensor:
            batch, _, tokens, _ = x.shape
            heads = split_last(x.view(batch, tokens, num_heads * width), *[width] * num_heads)
            return cat_last([norm(head) for norm, head in zip(norms, heads, strict=True)]).view(*x.shape)

        return forward
