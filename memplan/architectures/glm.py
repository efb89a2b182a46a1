"""glm and glm4: half of each head rotates, neighbours as pairs; gate and up from one product; glm4 has more norms.

Sources: transformers 5.17 models/glm/modeling_glm.py, models/glm4/modeling_glm4.py. What is special for memory:
- each layer makes rotary tables of its own out of the shared ones, and keeps them;
- the rotation ends in a concatenation, which leaves q and k by heads in memory;
- glm4 has a norm after attention and after the MLP as well.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Layer
from memplan.architectures.llama import Llama
from memplan.architectures.phi3 import Phi3
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import add
from memplan.ops.rotary import apply_partial_rotary_pairs
from memplan.ops.tensor import Tensor


class Glm(Phi3):
    self_attention = Llama.self_attention  # not phi3's one projection

    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None and shared.sin is not None
        return apply_partial_rotary_pairs(q, k, shared.cos, shared.sin)


class Glm4(Glm):
    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        hidden = self.spec.hidden_size
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", hidden)
        post_norm = self.norm(build, "post_attention_layernorm", hidden)
        post_attention_norm = self.norm(build, "post_self_attn_layernorm", hidden)
        post_mlp_norm = self.norm(build, "post_mlp_layernorm", hidden)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states, _ = attention(hidden_states)
            hidden_states = post_attention_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            residual = hidden_states
            hidden_states = post_norm(hidden_states)
            hidden_states = mlp(hidden_states)
            hidden_states = post_mlp_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward
