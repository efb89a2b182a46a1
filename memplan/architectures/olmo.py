"""olmo, olmo2 and olmo3: rotary tables in fp32, so that queries and keys are rotated in fp32.

Sources: transformers 5.17 models/olmo/modeling_olmo.py, models/olmo2/modeling_olmo2.py, models/olmo3/modeling_olmo3.py.
What is special for memory:
- the products with cos and sin are fp32 whatever the model's dtype, and cast back after the sum;
- olmo: LayerNorm without weights, run in fp32 between two casts; clipping keeps copies of q, k and v; with a tied head
  the last parameter of all is the last layer's down_proj, which is therefore not quantised
  (quantizers/base.py `get_keys_to_not_convert` takes it for the head);
- olmo2 and olmo3: norms after attention and MLP in place of before; q and k are normed over their whole projection;
  a norm multiplies by its weight in fp32, and casts after it;
- olmo3: layers with a sliding window, which have a rotary table of their own.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Mlp, Norm
from memplan.architectures.llama import Llama
from memplan.architectures.norms_after import NormsAfter
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.ops.norm import LateCastRMSNorm, LayerNorm
from memplan.ops.pointwise import clip_in_place, to
from memplan.ops.tensor import Tensor

_LAST = " without a quantised down_proj"


class Olmo(Llama):
    def layer_kind(self, index: int) -> str:
        spec, kind = self.spec, super().layer_kind(index)
        taken_for_head = spec.tie_word_embeddings and not spec.norm_affine and index == spec.num_hidden_layers - 1
        return kind + _LAST if taken_for_head else kind

    def mlp(self, build: Builder, kind: str) -> Mlp:
        return self.gated_mlp(build, quantises_down_proj=not kind.endswith(_LAST))

    def shared_dtype(self, hidden: DType) -> DType:
        return DType.fp32

    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        q_type, k_type = q.dtype, k.dtype
        q_embed, k_embed = super().rotate(q, k, shared)
        return to(q_embed, q_type), to(k_embed, k_type)

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        spec = self.spec
        width, kv_width = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        q_proj, k_proj, v_proj, o_proj = self.attention_projections(build)
        q_norm = self.projection_norm(build, "self_attn.q_norm", width)
        k_norm = self.projection_norm(build, "self_attn.k_norm", kv_width)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q = q_norm(q_proj(x))
            k = k_norm(k_proj(x))
            v = v_proj(x)
            if spec.clip_qkv is not None:
                q, k, v = clip_in_place(q), clip_in_place(k), clip_in_place(v)
            q = self.heads(q, spec.num_attention_heads, shared, rotated=True)
            k = self.heads(k, spec.num_key_value_heads, shared, rotated=True)
            v = self.heads(v, spec.num_key_value_heads, shared)
            q, k = self.rotate(q, k, shared)
            output, attn_weights = self.attention(q, k, v, shared)
            output = output.view(*x.shape[:-1], width)
            output = o_proj(output)
            return output, attn_weights

        return forward

    def projection_norm(self, build: Builder, name: str, width: int) -> Norm:
        """The norm over a whole projection of queries or keys; olmo has none."""
        return lambda x: x

    def norm(self, build: Builder, name: str, width: int) -> Norm:
        norm = LayerNorm(None, None)

        def forward(hidden_states: Tensor) -> Tensor:
            return to(norm(to(hidden_states, DType.fp32)), hidden_states.dtype)

        return forward


class Olmo2(NormsAfter, Olmo):
    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return LateCastRMSNorm(build.parameter(f"{name}.weight", (width,)))

    def projection_norm(self, build: Builder, name: str, width: int) -> Norm:
        return self.norm(build, name, width)


class Olmo3(Olmo2):
    sliding_layers_have_own_rotary = True

    def attention_windows(self) -> dict[str, int | None]:
        return {"full_attention": None, "sliding_attention": self.spec.sliding_window}
