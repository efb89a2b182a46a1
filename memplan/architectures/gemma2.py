"""gemma2 and gemma3_text: gemma with norms on both sides of attention and of the MLP, and layers with a window.

Sources: transformers 5.17 models/gemma2/modeling_gemma2.py, models/gemma3/modeling_gemma3.py. For memory:
- gemma2 caps the logits by tanh, three tensors of their size of which one is kept; eager attention caps its scores too
  (sdpa does not);
- gemma3 norms q and k by head and has a rotary table of its own for sliding layers.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Layer
from memplan.architectures.gemma import Gemma
from memplan.architectures.shared import Shared
from memplan.ops.pointwise import add, mul_number, saves_result
from memplan.ops.tensor import Tensor


class Gemma2(Gemma):
    def attention_windows(self) -> dict[str, int | None]:
        return {"full_attention": None, "sliding_attention": self.spec.sliding_window}

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        hidden = self.spec.hidden_size
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", hidden)
        post_attention_norm = self.norm(build, "post_attention_layernorm", hidden)
        pre_mlp_norm = self.norm(build, "pre_feedforward_layernorm", hidden)
        post_mlp_norm = self.norm(build, "post_feedforward_layernorm", hidden)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states, _ = attention(hidden_states)
            hidden_states = post_attention_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            residual = hidden_states
            hidden_states = pre_mlp_norm(hidden_states)
            hidden_states = mlp(hidden_states)
            hidden_states = post_mlp_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward

    @property
    def soft_caps_scores(self) -> bool:
        return self.spec.attn_logit_softcapping is not None

    def after_head(self, logits: Tensor) -> Tensor:
        if self.spec.final_logit_softcapping is None:
            return logits
        logits = mul_number(logits)  # written out as in the module: each line lets go of the one before
        logits = saves_result(logits)
        return mul_number(logits)


class Gemma3(Gemma2):
    norms_heads_last = True
    sliding_layers_have_own_rotary = True

    @property
    def soft_caps_scores(self) -> bool:
        return False  # the module passes no cap on to its attention function
