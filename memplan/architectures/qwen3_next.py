"""qwen3_next: layers of a gated delta rule, each fourth one with attention, all with experts and a shared expert.

Source: transformers 5.17 models/qwen3_next/modeling_qwen3_next.py, the PyTorch code of `Qwen3NextGatedDeltaNet` that
runs without flash-linear-attention and causal-conv1d. B batch, S tokens, G key heads of width K, H value heads of width
V, d bytes an element. Beside the delta rule (ops/delta_rule.py) and the convolution (ops/causal_conv.py) a layer with
linear attention has:

    tensor                  shape               lives until
    in_proj_qkvz, _ba       [B, S, 2(GK + HV)]  the layer's attention returns (a gate that is a view: until backward)
    value, gate, b, a       [B, S, H V], ...    copies out of the heads' blocks; the gate until backward
    query, key              [B, S, G K]         copies, until they are concatenated for the convolution
    query, key by head      [B, S, H, K]        repeated for the value heads; the attention returns
    beta                    [B, S, H]           saved by sigmoid
    decay                   [B, S, H] fp32      three: what softplus reads and makes, and their product
    gated norm              [B S H, V]          fp32: input, gate and silu(gate); d: normed, weighted

With a padded batch the hidden states are multiplied by the mask first, which makes one more tensor of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from memplan.architectures.builder import AnyLinear, Builder
from memplan.architectures.decoder import Attention, Layer, Norm
from memplan.architectures.moe import Qwen2Moe
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.ops.autocast import high
from memplan.ops.causal_conv import causal_conv
from memplan.ops.delta_rule import CHUNK_SIZE, chunk_gated_delta_rule
from memplan.ops.norm import GatedRMSNorm
from memplan.ops.pointwise import (
    add,
    cat_last,
    clone,
    copied_in_backward,
    expand_copy,
    mul,
    neg,
    saves_input,
    saves_result,
    split_last,
    to,
)
from memplan.ops.rotary import apply_partial_rotary_pair
from memplan.ops.tensor import Machine, Storage, Tensor

_LINEAR = "linear_attention"
Projected = tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, list[Tensor]]
"""Parts of what the convolution reads, which live until it has run; that; gate, b and a; what lives to the end."""
Projections = Callable[[Tensor], Projected]
GatedNorm = Callable[[Tensor, Tensor], Tensor]


class Qwen3Next(Qwen2Moe):
    def layer_kind(self, index: int) -> str:
        kind = super().layer_kind(index)
        return kind.replace("full_attention", _LINEAR) if self.spec.is_linear_layer(index) else kind

    def attention_windows(self) -> dict[str, int | None]:
        return {"full_attention": None}

    def make_other_masks(self, machine: Machine) -> None:
        """`create_recurrent_attention_mask`: the batch's own mask, unless (mask == 1).all()."""
        if self.gets_mask:
            is_one = machine.empty(self.batch, DType.bool8)
            all_ones = machine.empty((), DType.bool8)
            del is_one, all_ones

    def shared_of(self, kind: str, shared: Shared) -> Shared:
        return replace(shared, mask=None) if kind.startswith(_LINEAR) else shared

    def warnings(self) -> list[str]:
        found = super().warnings()
        if _LINEAR in self.spec.layer_types:
            found.append(
                "layers with linear attention are counted as transformers runs them in PyTorch alone; with "
                "flash-linear-attention and causal-conv1d installed they need less, which is not modelled"
            )
        return found

    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return build.offset_rms_norm(name, width)

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        mixer = self.linear_attention(build) if kind.startswith(_LINEAR) else self.self_attention(build, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", self.spec.hidden_size)
        post_norm = self.norm(build, "post_attention_layernorm", self.spec.hidden_size)

        def forward(hidden_states: Tensor) -> Tensor:
            assert shared.cos is not None  # every layer is given the tables, and a checkpoint keeps what it is given
            residual = hidden_states
            hidden_states = norm(hidden_states)
            hidden_states, _ = mixer(hidden_states)
            hidden_states = add(residual, hidden_states)
            residual = hidden_states
            hidden_states = post_norm(hidden_states)
            hidden_states = mlp(hidden_states)
            hidden_states = add(residual, hidden_states)
            return hidden_states  # noqa: RET504  the old one dies before the residual, as in the module

        return forward

    def self_attention(self, build: Builder, shared: Shared, *, rope: bool = True) -> Attention:
        """Each query head has a gate of its width beside it, which its output is multiplied by."""
        spec = self.spec
        hidden, width = spec.hidden_size, spec.num_attention_heads * spec.head_dim
        num_heads, num_kv_heads, head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        q_proj = build.linear("self_attn.q_proj", hidden, 2 * width, bias=spec.attention_bias)
        k_proj = build.linear("self_attn.k_proj", hidden, num_kv_heads * head_dim, bias=spec.attention_bias)
        v_proj = build.linear("self_attn.v_proj", hidden, num_kv_heads * head_dim, bias=spec.attention_bias)
        o_proj = build.linear("self_attn.o_proj", width, hidden, bias=spec.attention_bias)
        q_norm = self.head_norm(build, "self_attn.q_norm", num_heads)
        k_norm = self.head_norm(build, "self_attn.k_norm", num_kv_heads)

        def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
            batch, tokens, _ = x.shape
            both = q_proj(x).view(batch, num_heads, tokens, 2 * head_dim)
            query_states, gate = split_last(both, head_dim, head_dim)
            del both
            gate = clone(gate) if num_heads > 1 else gate
            query_states = q_norm(query_states)
            key_states = k_norm(self.heads(k_proj(x), num_kv_heads, shared, rotated=True))
            value_states = self.heads(v_proj(x), num_kv_heads, shared)
            assert shared.cos is not None and shared.sin is not None
            query_states, key_states = apply_partial_rotary_pair(query_states, key_states, shared.cos, shared.sin)
            attn_output, attn_weights = self.attention(query_states, key_states, value_states, shared, by_heads=True)
            attn_output = attn_output.view(batch, tokens, width)
            attn_output = mul(attn_output, saves_result(gate.view(batch, tokens, width)))
            attn_output = o_proj(attn_output)
            return attn_output, attn_weights

        return forward

    def linear_attention(self, build: Builder) -> Attention:
        """`Qwen3NextGatedDeltaNet`."""
        spec = self.spec
        num_v_heads, groups = spec.linear_num_value_heads, spec.linear_num_value_heads // spec.linear_num_key_heads
        k_dim, v_dim = spec.linear_key_head_dim, spec.linear_value_head_dim
        key_dim, value_dim = spec.linear_num_key_heads * k_dim, num_v_heads * v_dim
        conv_dim = 2 * key_dim + value_dim
        dt_bias = build.parameter("linear_attn.dt_bias", (num_v_heads,))
        A_log = build.parameter("linear_attn.A_log", (num_v_heads,))
        (conv1d,) = build.own("linear_attn.conv1d", ("weight", (conv_dim, 1, spec.linear_conv_kernel_dim)))
        project, norm, out_proj = self.projections(build)
        activation = self.activation()
        gate_is_spread = self.gate_is_spread

        def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
            batch, tokens, _ = hidden_states.shape
            if self.config.padding:
                mask = Tensor(Storage(hidden_states.machine, 0), (batch, tokens, 1), DType.int64)  # the batch's own
                hidden_states = mul(hidden_states, mask)
                del mask
            parts, mixed_qkv, z, b, a, held = project(hidden_states)
            mixed_qkv = mixed_qkv.view(batch, conv_dim, tokens)
            mixed_qkv = causal_conv(mixed_qkv, conv1d, activation)
            mixed_qkv = mixed_qkv.view(batch, tokens, conv_dim)
            query, key, value = split_last(mixed_qkv, key_dim, key_dim, value_dim)
            del parts
            by_heads = batch, num_v_heads, tokens
            value = copied_in_backward(value, (*by_heads, v_dim))
            beta = saves_result(b)
            decay = mul(
                neg(saves_result(high(to(A_log, DType.fp32)))), saves_input(high(add(to(a, DType.fp32), dt_bias)))
            )
            if groups > 1:
                query, key = [expand_copy(x, (*by_heads, k_dim)) for x in (query, key)]
            else:
                query, key = [copied_in_backward(x, (*by_heads, k_dim)) for x in (query, key)]
            core_attn_out = chunk_gated_delta_rule(query, key, value, decay.view(*by_heads), beta.view(*by_heads))
            core_attn_out = core_attn_out.view(batch, tokens, num_v_heads, v_dim)
            if core_attn_out.dtype is DType.fp32 and tokens > CHUNK_SIZE:
                core_attn_out = clone(core_attn_out)  # no cast has put the tokens first
            z = clone(z) if gate_is_spread else z
            core_attn_out = norm(core_attn_out, z.view(*core_attn_out.shape))
            output = out_proj(core_attn_out.view(batch, tokens, value_dim))
            del held
            return output, None

        return forward

    @property
    def gate_is_spread(self) -> bool:
        """The gate is a view whose rows are apart, so that the norm gets a copy."""
        return self.spec.linear_num_key_heads == 1 < self.spec.linear_num_value_heads

    def projections(self, build: Builder) -> tuple[Projections, GatedNorm, AnyLinear]:
        """What makes queries, keys and values, gate, b and a; the gated norm and the projection behind the rule."""
        spec = self.spec
        num_k_heads, num_v_heads = spec.linear_num_key_heads, spec.linear_num_value_heads
        key_dim, value_dim = num_k_heads * spec.linear_key_head_dim, num_v_heads * spec.linear_value_head_dim
        in_proj_qkvz = build.linear("linear_attn.in_proj_qkvz", spec.hidden_size, 2 * key_dim + 2 * value_dim)
        in_proj_ba = build.linear("linear_attn.in_proj_ba", spec.hidden_size, 2 * num_v_heads)
        norm, out_proj = self.behind_rule(build)
        copies, several = num_k_heads > 1, num_k_heads > 1 and num_v_heads > num_k_heads

        def project(hidden_states: Tensor) -> Projected:
            mixed_qkvz = in_proj_qkvz(hidden_states)
            mixed_ba = in_proj_ba(hidden_states)
            query, key, value, z = split_last(mixed_qkvz, key_dim, key_dim, value_dim, value_dim)
            b, a = split_last(mixed_ba, num_v_heads, num_v_heads)
            value = clone(value) if several else value
            z = clone(z) if several else z
            b = clone(b) if several else b
            a = clone(a) if several else a
            query, key = [clone(x) if copies else x for x in (query, key)]
            value = clone(value) if copies and not several else value
            return [query, key, value], cat_last([query, key, value]), z, b, a, [mixed_qkvz, mixed_ba]

        return project, norm, out_proj

    def behind_rule(self, build: Builder) -> tuple[GatedNorm, AnyLinear]:
        spec = self.spec
        norm = GatedRMSNorm(*build.own("linear_attn.norm", ("weight", (spec.linear_value_head_dim,))))
        value_dim = spec.linear_num_value_heads * spec.linear_value_head_dim
        return norm, build.linear("linear_attn.out_proj", value_dim, spec.hidden_size)
