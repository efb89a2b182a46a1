"""cohere: attention and MLP read one norm; LayerNorm without bias, written out; neighbours rotate as pairs, in fp32.

Source: transformers 5.17 models/cohere/modeling_cohere.py. For memory: the norm keeps three fp32 tensors
of its input's size; queries and keys are cast to fp32 before they rotate; the logits are scaled, one more tensor of
their size; embeddings are tied.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Layer, Norm
from memplan.architectures.llama import Llama
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.ops.norm import CohereLayerNorm
from memplan.ops.pointwise import add, mul_number, to
from memplan.ops.rotary import rotate_pairs
from memplan.ops.tensor import Tensor


class Cohere(Llama):
    norms_heads_last = True

    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return CohereLayerNorm(build.parameter(f"{name}.weight", (width,)))

    def head_norm(self, build: Builder, name: str, num_heads: int) -> Norm:
        """Each head has weights of its own; [num_heads, head_dim] in the module, which norms before it transposes."""
        return CohereLayerNorm(build.parameter(f"{name}.weight", (num_heads, 1, self.spec.head_dim)))

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", self.spec.hidden_size)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states_attention, _ = attention(hidden_states)
            hidden_states_mlp = mlp(hidden_states)
            hidden_states = add(add(residual, hidden_states_attention), hidden_states_mlp)
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward

    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None and shared.sin is not None
        dtype = q.dtype
        q, k = to(q, DType.fp32), to(k, DType.fp32)
        q_embed = rotate_pairs(q, shared.cos, shared.sin)
        k_embed = rotate_pairs(k, shared.cos, shared.sin)
        return to(q_embed, dtype), to(k_embed, dtype)

    def after_head(self, logits: Tensor) -> Tensor:
        return mul_number(logits)
