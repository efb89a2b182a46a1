"""opt: learned positions from the mask, ReLU, dropout on both residuals; 350m has a narrower embedding and norms after
attention and MLP.

Source: transformers 5.17 models/opt/modeling_opt.py. For memory:

- without an attention_mask the model makes one of ones [B, S] in fp32 and holds it; positions are a tensor [B, S] of
  their own, and the position embedding keeps them shifted by two;
- with `word_embed_proj_dim` other than `hidden_size` the embedding goes through `project_in`, the last hidden states
  through `project_out`: linear layers, so that adapters and quantisation take them too;
- queries are scaled before attention, which keeps the scaled copy only;
- the MLP runs on [B * S, hidden], so that its gradients are no reshaped views.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Decoder, Layer, Norm
from memplan.architectures.shared import Shared, causal_mask
from memplan.dtypes import DType
from memplan.ops.embedding import Embedding, embedding
from memplan.ops.pointwise import add, dropout, mul_number
from memplan.ops.tensor import Machine, Tensor

POSITION_OFFSET = 2
"""Rows of the position table that no token uses (`OPTLearnedPositionalEmbedding.offset`)."""


class OPT(Decoder):
    layer_prefix = "model.decoder.layers"
    embedding_name = "model.decoder.embed_tokens"
    looks_up_positions = True

    def rotary_dim(self) -> int | None:
        return None

    def embed(self, build: Builder) -> Tensor:
        spec, m = self.spec, build.machine
        assert spec.max_position_embeddings is not None
        inputs_embeds = self.embed_tokens(build, self.embedding_width)
        held = [] if self.gets_mask else [m.empty(self.batch, DType.fp32)]
        build.position_ids = self.positions(m)
        rows = spec.max_position_embeddings + POSITION_OFFSET
        name = "model.decoder.embed_positions.weight"
        table = Embedding(build.parameter(name, (rows, spec.hidden_size), of="Embedding"))
        pos_embeds = embedding(table, self.batch, m.empty(self.batch, DType.int64))
        if self.embedding_width != spec.hidden_size:
            project_in = build.linear("model.decoder.project_in", self.embedding_width, spec.hidden_size)
            inputs_embeds = project_in(inputs_embeds)
        build.holds(*held, inputs_embeds, pos_embeds)
        return add(inputs_embeds, pos_embeds)

    def positions(self, m: Machine) -> Tensor:
        """(cumsum(attention_mask) * attention_mask - 1).long()"""
        dtype = DType.int64 if self.gets_mask else DType.fp32
        counted = m.empty(self.batch, dtype)
        counted_here = m.empty(self.batch, dtype)
        shifted = m.empty(self.batch, dtype)
        del counted_here
        if dtype is DType.int64:
            return shifted
        position_ids = m.empty(self.batch, DType.int64)
        del shifted, counted
        return position_ids

    def make_shared(self, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Shared:
        if position_ids is None:
            position_ids = self.positions(machine)
        mask = causal_mask(self, machine, dtype, window=None, given=True)
        return Shared(position_ids=position_ids, mask=mask)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        spec = self.spec
        hidden, width = spec.hidden_size, spec.intermediate_size
        attention = self.self_attention(build, shared)
        self_attn_layer_norm = build.layer_norm("self_attn_layer_norm", hidden, affine=spec.norm_affine)
        fc1 = build.linear("fc1", hidden, width, bias=spec.mlp_bias)
        fc2 = build.linear("fc2", width, hidden, bias=spec.mlp_bias)
        final_layer_norm = build.layer_norm("final_layer_norm", hidden, affine=spec.norm_affine)
        activation = self.activation()
        before, p = spec.do_layer_norm_before, spec.hidden_dropout

        def forward(hidden_states: Tensor) -> Tensor:
            shape = hidden_states.shape
            residual = hidden_states
            if before:
                hidden_states = self_attn_layer_norm(hidden_states)
            hidden_states, _ = attention(hidden_states)
            hidden_states = dropout(hidden_states, p)
            hidden_states = add(residual, hidden_states)
            if not before:
                hidden_states = self_attn_layer_norm(hidden_states)
            hidden_states = hidden_states.view(shape[0] * shape[1], hidden)
            residual = hidden_states
            if before:
                hidden_states = final_layer_norm(hidden_states)
            hidden_states = fc1(hidden_states)
            hidden_states = activation(hidden_states)
            hidden_states = fc2(hidden_states)
            hidden_states = dropout(hidden_states, p)
            hidden_states = add(residual, hidden_states).view(*shape)
            if not before:
                hidden_states = final_layer_norm(hidden_states)
            return hidden_states

        return forward

    def self_attention(self, build: Builder, shared: Shared) -> Attention:
        spec = self.spec
        hidden, heads = spec.hidden_size, spec.num_attention_heads
        k_proj = build.linear("self_attn.k_proj", hidden, hidden, bias=spec.attention_bias)
        v_proj = build.linear("self_attn.v_proj", hidden, hidden, bias=spec.attention_bias)
        q_proj = build.linear("self_attn.q_proj", hidden, hidden, bias=spec.attention_bias)
        out_proj = build.linear("self_attn.out_proj", hidden, hidden, bias=spec.attention_out_bias)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            q = self.heads(mul_number(q_proj(x)), heads)
            k, v = k_proj(x), v_proj(x)
            k, v = self.heads(k, heads), self.heads(v, heads)
            attn_output, attn_weights = self.attention(q, k, v, shared)
            attn_output = attn_output.view(*x.shape)
            attn_output = out_proj(attn_output)
            return attn_output, attn_weights

        return forward

    def final_norm(self, build: Builder) -> Norm:
        spec = self.spec
        norm = project_out = None
        if self.embedding_width != spec.hidden_size:
            project_out = build.linear("model.decoder.project_out", spec.hidden_size, self.embedding_width)
        if spec.final_norm:
            norm = build.layer_norm("model.decoder.final_layer_norm", spec.hidden_size, affine=spec.norm_affine)

        def forward(hidden_states: Tensor) -> Tensor:
            if norm is not None:
                hidden_states = norm(hidden_states)
            return hidden_states if project_out is None else project_out(hidden_states)

        return forward
