"""falcon: multi-query (7b), grouped (40b, 180b, 11b) and ordinary attention (rw), beside the MLP or before it,
rotary positions or biases by distance.

Source: transformers 5.17 models/falcon/modeling_falcon.py. For memory:

- its linear layers are a class of their own (`FalconLinear`): transformers' bitsandbytes integration quantises
  `nn.Linear` alone (integrations/bitsandbytes.py `replace_with_bnb_linear`), so that "QLoRA" leaves the whole model in
  16 bits, and k-bit preparation makes it fp32; see `warnings`;
- a mask is always made, so that sdpa never is causal by a flag: cuDNN and the efficient kernel keep it in each layer;
- multi-query attention passes one key head without `enable_gqa`: no fused kernel takes it, and the probabilities
  [B, N, S, S] are kept in fp32;
- grouped attention repeats keys and values for all heads before it rotates them;
- alibi is merged into the mask of sdpa, which becomes [B, N, S, S];
- the MLP's output takes attention's in place.
"""

from __future__ import annotations

from memplan.architectures.bloom import alibi_slopes, dropout_add
from memplan.architectures.builder import AnyLinear, Builder
from memplan.architectures.decoder import Attention, Decoder, Layer, Mlp, Norm
from memplan.architectures.falcon_attention import (
    attend_by_alibi,
    attend_by_ops,
    key_value_heads,
    merge_alibi,
    split_heads,
)
from memplan.architectures.shared import Shared, causal_mask, positions, rotary_table
from memplan.dtypes import DType
from memplan.ops.attention import sdpa
from memplan.ops.linear import MatmulLinear
from memplan.ops.pointwise import add_in_place, contiguous, to
from memplan.ops.sdpa_math import math_attention_over_one_key
from memplan.ops.tensor import Machine, Tensor


class Falcon(Decoder):
    layer_prefix = "transformer.h"
    embedding_name = "transformer.word_embeddings"
    rotary_name = "transformer.rotary_emb"

    def rotary_dim(self) -> int | None:
        return self.spec.head_dim  # the tables are made with alibi too

    def warnings(self) -> list[str]:
        if self.config.method != "qlora":
            return super().warnings()
        return [
            *super().warnings(),
            "bitsandbytes does not quantise falcon's linear layers (transformers replaces plain nn.Linear only): this "
            "run takes as much memory as `method=lora`, more with k-bit preparation",
        ]

    def embed(self, build: Builder) -> Tensor:
        inputs_embeds = self.embed_tokens(build)
        made_mask = self.spec.alibi and not self.gets_mask
        build.holds(*([build.machine.empty(self.batch, DType.int64)] if made_mask else []), inputs_embeds)
        return inputs_embeds

    def make_shared(self, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Shared:
        shared = Shared()
        if self.spec.alibi:
            shared.alibi = build_alibi_tensor(machine, self.batch, self.spec.num_attention_heads, dtype)
        shared.position_ids = positions(machine, self.config.seq_len)
        shared.mask = causal_mask(self, machine, dtype, window=None, detects_packing=False, always=True)
        if shared.alibi is not None:
            assert shared.mask is not None
            shared.mask = merge_alibi(machine, shared.alibi, shared.mask, dtype)
        shared.cos, shared.sin = rotary_table(machine, self.config.seq_len, self.spec.head_dim, dtype)
        return shared

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        spec = self.spec
        attention = self.self_attention(build, shared)
        mlp = self.mlp(build)
        parallel, two_norms = spec.parallel_residual, spec.num_ln_in_parallel_attn == 2
        names = ["ln_attn", "ln_mlp"] if two_norms else ["input_layernorm"]
        if not parallel:
            names = ["post_attention_layernorm", "input_layernorm"]
        norms = {name: build.layer_norm(name, spec.hidden_size) for name in names}
        first = norms["ln_attn" if parallel and two_norms else "input_layernorm"]

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
            residual = hidden_states
            attention_layernorm_out = first(hidden_states)
            mlp_layernorm_out = attention_layernorm_out
            if parallel and two_norms:
                mlp_layernorm_out = norms["ln_mlp"](hidden_states)
            attention_output, attn_weights = attention(attention_layernorm_out)
            if not parallel:
                residual = dropout_add(attention_output, residual, spec.attention_dropout)
                mlp_layernorm_out = norms["post_attention_layernorm"](residual)
            mlp_output = mlp(mlp_layernorm_out)
            if parallel:
                mlp_output = add_in_place(mlp_output, attention_output)
            output = dropout_add(mlp_output, residual, spec.hidden_dropout)
            return output, attn_weights

        return forward

    def self_attention(self, build: Builder, shared: Shared) -> Attention:
        spec = self.spec
        hidden, heads = spec.hidden_size, spec.num_attention_heads
        kv_heads = key_value_heads(spec)
        width = (heads + 2 * kv_heads) * spec.head_dim
        query_key_value = self.falcon_linear(build, "self_attention.query_key_value", hidden, width)
        dense = self.falcon_linear(build, "self_attention.dense", hidden, hidden)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            fused_qkv = query_key_value(x)
            query, key, value = split_heads(spec, fused_qkv)
            if shared.alibi is None:
                query, key = self.rotate(query, key, shared)
            held: list[Tensor] = []
            attn_output, attention_scores = self.attend(query, key, value, shared, x.dtype, held)
            attn_output = attn_output.view(*x.shape)
            attn_output = dense(attn_output)
            return attn_output, attention_scores

        return forward

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, shared: Shared, dtype: DType, held: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, N, D], and what the layer returns beside it; `held` gets what lives until attention returns."""
        assert shared.mask is not None
        scores: Tensor | None = None
        if self.attention_implementation == "eager" and shared.alibi is None:
            output, scores = attend_by_ops(query, key, value, shared.mask, dtype)
        elif self.attention_implementation == "eager":
            assert shared.alibi is not None
            p = self.spec.attention_dropout
            output, scores, held[:] = attend_by_alibi(query, key, value, shared.alibi, shared.mask, dtype, p)
        elif key.shape[1] != query.shape[1]:
            output = math_attention_over_one_key(query, key, value, shared.mask)
        else:
            return sdpa(query, key, value, mask=shared.mask, num_groups=1)
        return contiguous(output), scores

    def mlp(self, build: Builder) -> Mlp:
        spec = self.spec
        dense_h_to_4h = self.falcon_linear(build, "mlp.dense_h_to_4h", spec.hidden_size, spec.intermediate_size)
        dense_4h_to_h = self.falcon_linear(build, "mlp.dense_4h_to_h", spec.intermediate_size, spec.hidden_size)
        activation = self.activation()

        def forward(x: Tensor) -> Tensor:
            x = activation(dense_h_to_4h(x))
            return dense_4h_to_h(x)

        return forward

    def falcon_linear(self, build: Builder, name: str, in_features: int, out_features: int) -> AnyLinear:
        bias = self.spec.mlp_bias
        return build.linear(name, in_features, out_features, bias=bias, quantise=False, kind=MatmulLinear)

    def final_norm(self, build: Builder) -> Norm:
        return build.layer_norm("transformer.ln_f", self.spec.hidden_size)


def build_alibi_tensor(m: Machine, batch: tuple[int, int], num_heads: int, dtype: DType) -> Tensor:
    """Biases [B * N, 1, S] in `dtype`, computed in bf16 from a mask of integers (`build_alibi_tensor`)."""
    slopes = alibi_slopes(m, num_heads)
    counted = m.empty(batch, DType.int64)
    shifted = m.empty(batch, DType.int64)
    del counted
    arange = m.empty(batch, DType.int64)
    del shifted
    half = m.empty((num_heads, 1), DType.bf16)
    alibi = m.empty((batch[0] * num_heads, 1, batch[1]), DType.bf16)
    del half
    cast = to(alibi, dtype)
    del slopes, arange
    return cast
