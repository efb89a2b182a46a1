"""gemma4_text: gemma3 whose layers may have an embedding each and share keys and values, with wider heads in some.

Source: transformers 5.17 models/gemma4/modeling_gemma4.py. What is special for memory:
- a norm multiplies by its weight in fp32 as it is; values are normed too, by a norm without weight;
- layers with full attention have wider heads, and a rotary table of their own width;
- a table gives each layer an embedding of its own (`hidden_size_per_layer_input`): all of them, [B, S, layers, width],
  live as long as the layers, and the backward of each layer makes zeros of all of them for its gradient;
- the last layer of each kind that makes keys and values leaves them in a dict that all layers are given. The last
  `num_kv_shared_layers` layers read them there and have no projections for them. Checkpoints hold the dict, so that
  what it holds stays until the first layer's backward, and with it the graph of the recomputation that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Attention, Layer, Mlp, Norm
from memplan.architectures.gemma2 import Gemma3
from memplan.architectures.gemma4_moe import experts_of
from memplan.architectures.moe_warnings import moe_warnings
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.ops.attention import split_heads
from memplan.ops.norm import PowRMSNorm
from memplan.ops.pointwise import add, mul, mul_in_place, mul_number
from memplan.ops.rotary import rotate
from memplan.ops.rows import flatten_tokens, select
from memplan.ops.tensor import Tensor
from memplan.units import human

_ALL = "per_layer_inputs"
_OWN = "per_layer_input"
_SHARING = " sharing keys and values"


class Gemma4(Gemma3):
    registered_late: tuple[str, ...] = ("model.embed_tokens_per_layer", "model.per_layer")

    # What the layers are told apart by

    def layer_kind(self, index: int) -> str:
        """With an int8 base layers differ by what the gates of their own inputs read: three norms' outputs more in
        each."""
        kind = self.attention_kind(index)
        by_depth = self.config.quant_type == "int8" and self.spec.hidden_size_per_layer_input
        return f"{kind} {index}" if by_depth else kind

    def attention_kind(self, index: int) -> str:
        return super().layer_kind(index) + (_SHARING if self.spec.shares_kv(index) else "")

    def reads(self, index: int) -> tuple[str, ...]:
        names = (_ALL,) if self.spec.hidden_size_per_layer_input else ()
        if not self.spec.shares_kv(index):
            return names
        return *names, *_keys_and_values(Gemma3.layer_kind(self, index))

    def gives(self, index: int) -> tuple[str, ...]:
        """The last layer of each kind that makes keys and values leaves them, whether another reads them or not."""
        kinds = [Gemma3.layer_kind(self, i) for i in range(self.spec.num_hidden_layers) if not self.spec.shares_kv(i)]
        is_last = index < len(kinds) and kinds[index] not in kinds[index + 1 :]
        return _keys_and_values(kinds[index]) if is_last else ()

    def rotary_dim_of(self, kind: str) -> int | None:
        return self.head_dim(kind)

    def head_dim(self, kind: str) -> int:
        full = self.spec.global_head_dim or self.spec.head_dim
        return self.spec.head_dim if kind.startswith("sliding") else full

    def num_key_value_heads(self, kind: str) -> int:
        full = self.spec.num_global_key_value_heads or self.spec.num_key_value_heads
        return self.spec.num_key_value_heads if kind.startswith("sliding") else full

    def warnings(self) -> list[str]:
        experts = moe_warnings(self.spec, self.config) if self.spec.is_moe else []
        return [*super().warnings(), *experts, *self.table_warnings()]

    def table_warnings(self) -> list[str]:
        spec, config = self.spec, self.config
        rows = spec.vocab_size_per_layer_input * spec.num_hidden_layers * spec.hidden_size_per_layer_input
        if config.method != "qlora" or not rows:
            return []
        plain = human(rows * DType[config.weight_dtype].itemsize)
        text = f"the table of the layers' own embeddings is not quantised: it stays in {config.weight_dtype} ({plain})"
        if config.kbit_prep and config.weight_dtype != "fp32":
            cast = human(rows * DType.fp32.itemsize)
            text += f", and prepare_model_for_kbit_training casts it to fp32 ({cast})"
        return [text]

    # The model

    def embed(self, build: Builder) -> Tensor:
        embeddings = super().embed(build)
        if self.spec.hidden_size_per_layer_input:
            token_identity = self.look_up_per_layer(build)
            build.carried[_ALL] = self.project_per_layer(build, embeddings, token_identity)
            build.holds(embeddings)
        return embeddings

    def look_up_per_layer(self, build: Builder) -> Tensor:
        """`get_per_layer_inputs`: the part of the layers' own embeddings that a table gives."""
        spec, name = self.spec, "model.embed_tokens_per_layer"
        embed_scale = build.buffer(f"{name}.embed_scale", (), build.dtype)
        width = spec.num_hidden_layers * spec.hidden_size_per_layer_input
        table = build.embedding(name, spec.vocab_size_per_layer_input, width, embed_scale, is_input=False)
        return table(self.batch)

    def project_per_layer(self, build: Builder, embeddings: Tensor, token_identity: Tensor) -> Tensor:
        """`project_per_layer_inputs`: the part that the embeddings give, and both together."""
        spec, own = self.spec, self.spec.hidden_size_per_layer_input
        projection = build.linear("model.per_layer_model_projection", spec.hidden_size, spec.num_hidden_layers * own)
        norm = self.norm(build, "model.per_layer_projection_norm", own)
        projected = mul_number(projection(embeddings))
        projected = projected.view(*self.batch, spec.num_hidden_layers, own)
        projected = norm(projected)
        return mul_number(add(projected, token_identity.view(*projected.shape)))

    def before_layer(self, build: Builder) -> tuple[str, ...]:
        own = self.spec.hidden_size_per_layer_input
        if not own:
            return ()
        build.carried[_OWN] = select(build.carried.pop(_ALL), (*self.batch, own))
        return (_OWN,)

    # A layer

    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return PowRMSNorm(*build.own(name, ("weight", (width,))))

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        spec = self.spec
        hidden = spec.hidden_size
        attention = self.attention_of(build, kind, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", hidden)
        post_attention_norm = self.norm(build, "post_attention_layernorm", hidden)
        pre_mlp_norm = self.norm(build, "pre_feedforward_layernorm", hidden)
        post_mlp_norm = self.norm(build, "post_feedforward_layernorm", hidden)
        layer_scalar = build.buffer("layer_scalar", (1,), build.dtype)
        add_own = self.own_input(build, kind) if spec.hidden_size_per_layer_input else None
        experts = experts_of(self, build) if spec.is_moe else None

        def forward(hidden_states: Tensor) -> Tensor:
            residual = hidden_states
            hidden_states = norm(hidden_states)
            _: Tensor | None
            hidden_states, _ = attention(hidden_states)
            hidden_states = post_attention_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            residual = hidden_states
            hidden_states = pre_mlp_norm(hidden_states)
            hidden_states = mlp(hidden_states)
            if experts is not None:
                hidden_states_1 = experts.post_mlp_norm(hidden_states)
                hidden_states_flat = flatten_tokens(residual)
                _, top_k_weights, top_k_index = experts.router(hidden_states_flat)  # in `_` it lets go of eager's
                hidden_states_2 = experts.pre_norm(hidden_states_flat)
                hidden_states_2 = experts.experts(hidden_states_2, top_k_index, top_k_weights)
                hidden_states_2 = hidden_states_2.view(*residual.shape)
                hidden_states_2 = experts.post_norm(hidden_states_2)
                hidden_states = add(hidden_states_1, hidden_states_2)
            hidden_states = post_mlp_norm(hidden_states)
            hidden_states = add(residual, hidden_states)
            if add_own is not None:
                residual = hidden_states
                hidden_states = add_own(hidden_states)
                hidden_states = add(residual, hidden_states)
            return mul_in_place(hidden_states, layer_scalar)

        return forward

    def own_input(self, build: Builder, kind: str) -> Mlp:
        """What the layer adds of the embedding of its own."""
        hidden, own, read = self.spec.hidden_size, self.spec.hidden_size_per_layer_input, build.carried
        depth = kind.rpartition(" ")[2]
        norms_before = 3 * int(depth) + 2 if depth.isdigit() else 0
        build.input_variance = norms_before + self.spec.initializer_range**2 * hidden
        gate = build.linear("per_layer_input_gate", hidden, own)
        projection = build.linear("per_layer_projection", own, hidden)
        build.input_variance = 1.0
        norm = self.norm(build, "post_per_layer_input_norm", hidden)
        activation = self.activation()

        def forward(x: Tensor) -> Tensor:
            x = gate(x)
            x = activation(x)
            x = mul(x, read[_OWN])
            x = projection(x)
            return norm(x)

        return forward

    def mlp(self, build: Builder, kind: str) -> Mlp:
        wide = self.spec.use_double_wide_mlp and _SHARING in kind
        return self.gated_mlp(build, self.spec.intermediate_size * (2 if wide else 1))

    def attention_of(self, build: Builder, kind: str, shared: Shared) -> Attention:
        spec = self.spec
        hidden, head_dim, num_heads = spec.hidden_size, self.head_dim(kind), spec.num_attention_heads
        width = num_heads * head_dim
        name_of_keys, name_of_values = _keys_and_values(kind.partition(" ")[0])
        read, given, gives = build.carried, build.given, bool(build.gives)
        q_proj = build.linear("self_attn.q_proj", hidden, width, bias=spec.attention_bias)
        q_norm = self.norm(build, "self_attn.q_norm", head_dim)
        keys_and_values = None if _SHARING in kind else self.keys_and_values(build, kind, shared)
        o_proj = build.linear("self_attn.o_proj", width, hidden, bias=spec.attention_out_bias)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            assert shared.cos is not None and shared.sin is not None
            q = split_heads(q_proj(x), num_heads, head_dim)
            q = q_norm(q)
            q = rotate(q, shared.cos, shared.sin)
            if keys_and_values is None:
                k, v = read[name_of_keys], read[name_of_values]
            else:
                k, v = keys_and_values(x)
            if gives:
                given[name_of_keys], given[name_of_values] = k, v
            output, attn_weights = self.attention(q, k, v, shared)
            output = output.view(*x.shape[:-1], width)
            output = o_proj(output)
            return output, attn_weights

        return forward

    def keys_and_values(self, build: Builder, kind: str, shared: Shared) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Where `attention_k_eq_v` says so, layers with full attention make values of the projection of keys."""
        spec, num_heads, head_dim = self.spec, self.num_key_value_heads(kind), self.head_dim(kind)
        k_norm, v_norm = self.norm(build, "self_attn.k_norm", head_dim), PowRMSNorm(None)
        width, bias = num_heads * head_dim, spec.attention_bias
        k_proj = build.linear("self_attn.k_proj", spec.hidden_size, width, bias=bias)
        v_proj = None
        if kind.startswith("sliding") or not spec.attention_k_eq_v:
            v_proj = build.linear("self_attn.v_proj", spec.hidden_size, width, bias=bias)

        def forward(x: Tensor) -> tuple[Tensor, Tensor]:
            assert shared.cos is not None and shared.sin is not None
            copies = self.copies_values(x, kind, shared)
            k = split_heads(k_proj(x), num_heads, head_dim, copies=copies and v_proj is None)
            v = k if v_proj is None else split_heads(v_proj(x), num_heads, head_dim, copies=copies)
            k = k_norm(k)
            k = rotate(k, shared.cos, shared.sin)
            return k, v_norm(v)

        return forward

    def copies_values(self, x: Tensor, kind: str, shared: Shared) -> bool:
        """Whether the gradient of the values comes back by heads, as a sum over repeated heads and products leave it.
        That of queries and keys comes by tokens, from the slices of the rotation."""
        num_heads = self.num_key_value_heads(kind)
        if self.attention_implementation == "eager":
            return num_heads > 1
        grouped = num_heads < self.spec.num_attention_heads
        repeats = shared.mask is not None or self.head_dim(kind) > 256
        fp32 = x.dtype is DType.fp32 and not self.config.autocast
        return grouped and num_heads > 1 and (repeats or fp32)


def _keys_and_values(kind: str) -> tuple[str, str]:
    return f"keys of {kind}", f"values of {kind}"
