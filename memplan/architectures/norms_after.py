"""Layers with norms after attention and MLP in place of before: olmo2, olmo3, exaone4.

Sources: transformers 5.17 models/olmo2/modeling_olmo2.py `Olmo2DecoderLayer`, models/exaone4/modeling_exaone4.py
`Exaone4DecoderLayer`. For memory: attention and MLP read the stream itself, so that what their projections save is what
the layer is given, and a norm saves what they return.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Layer
from memplan.architectures.llama import Llama
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import add
from memplan.ops.tensor import Tensor


class NormsAfter(Llama):
    def layer_kind(self, index: int) -> str:
        """With an int8 base layers differ by what their projections read: two norms' outputs more in each."""
        kind = super().layer_kind(index)
        return f"{kind} {index}" if self.config.quant_type == "int8" else kind

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        depth = kind.rpartition(" ")[2]
        before = 2.0 * int(depth) if depth.isdigit() else 0.0  # that of the embeddings is lost in it
        build.input_variance = before + self.spec.initializer_range**2
        attention = self.self_attention(build, shared, rope=self.has_rope(kind))
        build.input_variance += 1.0
        mlp = self.mlp(build, kind)
        post_attention_norm = self.norm(build, "post_attention_layernorm", self.spec.hidden_size)
        post_mlp_norm = self.norm(build, "post_feedforward_layernorm", self.spec.hidden_size)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states, _ = attention(hidden_states)
            hidden_states = post_attention_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            residual = hidden_states
            hidden_states = mlp(hidden_states)
            hidden_states = post_mlp_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward
