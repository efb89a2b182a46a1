"""qwen3_5_text (Qwen3.5): qwen3_next's layers with four projections before the gated delta rule, and dense MLPs.

Source: transformers 5.17 models/qwen3_5/modeling_qwen3_5.py. What is special for memory:
- the convolution reads what `in_proj_qkv` made, seen by channels: no copies of queries, keys and values. Its gradient
  comes back by channels, and so does that of `in_proj_b` by heads, so that with several sequences both are copied;
- rotary tables are made of three kinds of positions (text, height, width) and for each sequence of the batch.
"""

from __future__ import annotations

from memplan.architectures.builder import AnyLinear, Builder
from memplan.architectures.qwen3_next import GatedNorm, Projected, Projections, Qwen3Next
from memplan.dtypes import DType
from memplan.ops.dora import DoraLinear
from memplan.ops.int8 import Linear8bitLt
from memplan.ops.lora import LoraLinear
from memplan.ops.tensor import Machine, Tensor

_KINDS_OF_POSITIONS = 3


class Qwen3_5(Qwen3Next):
    @property
    def gate_is_spread(self) -> bool:
        return False

    def projections(self, build: Builder) -> tuple[Projections, GatedNorm, AnyLinear]:
        spec = self.spec
        hidden, num_v_heads = spec.hidden_size, spec.linear_num_value_heads
        key_dim, value_dim = (
            spec.linear_num_key_heads * spec.linear_key_head_dim,
            num_v_heads * spec.linear_value_head_dim,
        )
        norm, out_proj = self.behind_rule(build)
        in_proj_qkv = build.linear("linear_attn.in_proj_qkv", hidden, 2 * key_dim + value_dim)
        in_proj_z = build.linear("linear_attn.in_proj_z", hidden, value_dim)
        in_proj_b = build.linear("linear_attn.in_proj_b", hidden, num_v_heads)
        in_proj_a = build.linear("linear_attn.in_proj_a", hidden, num_v_heads)
        _copies_gradient(in_proj_qkv, self.config.micro_batch_size)
        _copies_gradient(in_proj_b, self.config.micro_batch_size)

        def project(hidden_states: Tensor) -> Projected:
            mixed_qkv = in_proj_qkv(hidden_states)
            z = in_proj_z(hidden_states)
            b = in_proj_b(hidden_states)
            a = in_proj_a(hidden_states)
            return [], mixed_qkv, z, b, a, []

        return project, norm, out_proj

    def rotary_table(self, machine: Machine, width: int, dtype: DType) -> tuple[Tensor, Tensor]:
        """`Qwen3_5TextRotaryEmbedding`: cos and sin [B, 1, S, H] in `dtype`, computed in fp32."""
        batch, tokens = self.batch
        shape, half = (batch, 1, tokens, width), (_KINDS_OF_POSITIONS, batch, tokens, width // 2)
        positions = machine.empty((_KINDS_OF_POSITIONS, batch, 1, tokens), DType.fp32)
        frequencies = machine.empty(half, DType.fp32)
        machine.calls("cublas")
        cosine = machine.empty(half, DType.fp32)
        cos = machine.empty(half, DType.fp32)
        del cosine
        sine = machine.empty(half, DType.fp32)
        sin = machine.empty(half, DType.fp32)
        del sine
        sin = machine.empty(shape, DType.fp32)
        cos = machine.empty(shape, DType.fp32)
        if dtype is not DType.fp32:
            cast = machine.empty(shape, dtype), machine.empty(shape, dtype)
            del positions, frequencies
            cos, sin = cast
        return cos, sin


def _copies_gradient(layer: AnyLinear, num_sequences: int) -> None:
    """Says that what `layer` makes gets a gradient that lies transposed: one sequence of it is a matrix for cuBLAS all
    the same, but LLM.int8() wants it contiguous."""
    parts = (layer.base, layer.lora_B) if isinstance(layer, LoraLinear | DoraLinear) else (layer,)
    for part in parts:
        part.copies_gradient = num_sequences > 1 or isinstance(part, Linear8bitLt)
