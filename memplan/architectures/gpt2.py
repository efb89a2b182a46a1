"""gpt2: fused q, k, v in a Conv1D, learned positions, dropout on embeddings, attention and residuals.

Source: transformers 5.17 models/gpt2/modeling_gpt2.py. For memory:

- `Conv1D` stores its weight [in, out] and adds its bias in the same product; PEFT adapts it as a linear layer and
  bitsandbytes quantises it as one;
- q, k and v are views of one projection, which stays for all three; their gradients are concatenated;
- every dropout keeps a mask of one byte an element: embeddings, attention output, MLP output, and under eager the
  attention probabilities;
- gelu_new is written out in eight elementwise ops, three of which keep a tensor of the MLP's width;
- the block keeps `attn_output` in a local until it returns;
- eager attention runs its softmax in the dtype of the scores.
"""

from __future__ import annotations

from memplan.architectures.builder import AnyLinear, Builder
from memplan.architectures.decoder import Attention, Decoder, Layer, Mlp, Norm
from memplan.architectures.shared import Shared, positions
from memplan.ops.embedding import Embedding, embedding
from memplan.ops.pointwise import add, dropout, split_last
from memplan.ops.tensor import Tensor


class GPT2(Decoder):
    layer_prefix = "transformer.h"
    embedding_name = "transformer.wte"
    looks_up_positions = True
    softmax_in_fp32 = False
    passes_mask_by_position = True

    def rotary_dim(self) -> int | None:
        return None

    def embed(self, build: Builder) -> Tensor:
        spec, tokens = self.spec, self.config.seq_len
        assert spec.max_position_embeddings is not None
        inputs_embeds = self.embed_tokens(build)
        build.position_ids = positions(build.machine, tokens)
        shape = spec.max_position_embeddings, spec.hidden_size
        wpe = Embedding(build.parameter("transformer.wpe.weight", shape, of="Embedding"))
        position_embeds = embedding(wpe, (1, tokens), build.position_ids)
        build.holds(inputs_embeds, position_embeds)
        return add(inputs_embeds, position_embeds)

    def enter(self, build: Builder, hidden_states: Tensor) -> Tensor:
        return dropout(hidden_states, self.spec.embedding_dropout)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        ln_1 = build.layer_norm("ln_1", self.spec.hidden_size)
        attention = self.self_attention(build, shared)
        ln_2 = build.layer_norm("ln_2", self.spec.hidden_size)
        mlp = self.mlp(build)

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = ln_1(hidden_states)
            attn_output, _ = attention(hidden_states)
            hidden_states = add(attn_output, residual)
            residual = hidden_states
            hidden_states = ln_2(hidden_states)
            feed_forward_hidden_states = mlp(hidden_states)
            hidden_states = add(residual, feed_forward_hidden_states)
            return hidden_states  # noqa: RET504  the locals die after it, as in the module

        return forward

    def self_attention(self, build: Builder, shared: Shared) -> Attention:
        spec = self.spec
        hidden, heads = spec.hidden_size, spec.num_attention_heads
        c_attn = self.conv1d(build, "attn.c_attn", hidden, 3 * hidden)
        c_proj = self.conv1d(build, "attn.c_proj", hidden, hidden)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q, k, v = split_last(c_attn(x), hidden, hidden, hidden)
            k, v = self.heads(k, heads), self.heads(v, heads)
            q = self.heads(q, heads)
            attn_output, attn_weights = self.attention(q, k, v, shared)
            attn_output = attn_output.view(*x.shape)
            attn_output = c_proj(attn_output)
            attn_output = dropout(attn_output, spec.hidden_dropout)
            return attn_output, attn_weights

        return forward

    def mlp(self, build: Builder) -> Mlp:
        spec = self.spec
        c_fc = self.conv1d(build, "mlp.c_fc", spec.hidden_size, spec.intermediate_size)
        c_proj = self.conv1d(build, "mlp.c_proj", spec.intermediate_size, spec.hidden_size)
        activation = self.activation()

        def forward(hidden_states: Tensor) -> Tensor:
            hidden_states = c_fc(hidden_states)
            hidden_states = activation(hidden_states)
            hidden_states = c_proj(hidden_states)
            return dropout(hidden_states, spec.hidden_dropout)

        return forward

    def conv1d(self, build: Builder, name: str, in_features: int, out_features: int) -> AnyLinear:
        return build.linear(name, in_features, out_features, bias=True, transposed=True)

    def final_norm(self, build: Builder) -> Norm:
        return build.layer_norm("transformer.ln_f", self.spec.hidden_size)
