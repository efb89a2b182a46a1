"""Matrix products and attention of one training step.

forward        2 * rows * out * in                       every linear layer, routed experts by their active rows
dX             the same                                  wherever a gradient is passed on
dW             the same                                  trained weights only: LoRA leaves it out for its base
recompute      forward once more                         each layer, under gradient checkpointing
attention      4 * B * heads * S**2 * head_dim forward, 2.5 times that in backward (it recomputes the scores);
               half of both where the kernel skips what the causal mask hides
               (Dao et al. 2022, "FlashAttention", section 3 and appendix B; Dao 2023, section 3.1)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.model_spec import ModelSpec
from memplan.timing.layers import Linear
from memplan.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Matmul:
    """`count` products [rows, depth] x [depth, cols] of one shape in one pass."""

    rows: int
    cols: int
    depth: int
    dtype: DType
    count: int
    phase: str
    """`forward`, `recompute`, `dx` or `dw`."""
    part: str
    """As of its `Linear`."""
    groups: int = 1
    """Of a grouped product: matrices multiplied in one kernel; `rows` is of all of them together."""

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.cols * self.depth * self.count

    @property
    def num_bytes(self) -> int:
        """Operands read and result written once each."""
        elements = self.rows * self.depth + self.rows * self.cols + self.groups * self.depth * self.cols
        return elements * self.dtype.itemsize * self.count

    @property
    def out_bytes(self) -> int:
        """Results written, the part of the traffic that the played program sees too."""
        if self.phase == "dw":
            return self.groups * self.depth * self.cols * self.dtype.itemsize * self.count
        width = self.depth if self.phase == "dx" else self.cols
        return self.rows * width * self.dtype.itemsize * self.count


@dataclass(frozen=True, slots=True)
class AttentionWork:
    """`count` layers' attention of one kernel in one pass."""

    flops: int
    kernel: str
    """`flash`, `efficient` or `eager`."""
    dtype: DType
    count: int
    seq_len: int
    phase: str


def matmuls(layers: list[Linear], spec: ModelSpec, config: TrainConfig) -> Iterator[Matmul]:
    """The products of one micro-step."""
    tokens = config.tokens_per_micro_batch
    for linear in layers:
        rows = tokens * (spec.num_experts_per_tok if linear.part == "experts" else 1)
        cols, depth, times = linear.out_features, linear.in_features, 1
        if linear.part == "delta":  # lora_B [out, rank] x lora_A [rank, in], made twice a forward
            rows, cols, depth, times = linear.out_features * linear.groups, linear.in_features, linear.rank, 2

        def product(
            phase: str,
            count: int,
            *,
            shape: tuple[int, int, int] = (rows, cols, depth),
            of: Linear = linear,
        ) -> Matmul:
            return Matmul(*shape, of.dtype, count, phase, of.part, of.groups)

        yield product("forward", linear.count * times)
        yield product("dx", linear.count)
        if linear.needs_dw:
            yield product("dw", linear.count)
        if config.gradient_checkpointing and linear.in_layers:
            yield product("recompute", (linear.count - (0 if config.reentrant else linear.last)) * times)
        if config.loss == "chunked" and linear.part == "head":  # backward makes each tile of logits again
            yield product("recompute", linear.count)


def attention_dtype(config: TrainConfig) -> DType:
    """dtype of queries, keys and values: that of the hidden states unless autocast."""
    if config.autocast:
        return DType.bf16
    if config.method == "qlora" and config.kbit_prep:
        return DType.fp32
    return DType[config.weight_dtype]


def attention_kernel(spec: ModelSpec, config: TrainConfig, window: int | None) -> tuple[str, bool]:
    """The kernel and whether it skips the masked half (a mask tensor makes it compute the whole square)."""
    dtype = attention_dtype(config)
    if config.attention == "eager":
        return "eager", False
    if config.attention == "flash_attention_2":
        return "flash", True
    masked = config.padding or spec.alibi or (window is not None and window <= config.seq_len)
    if masked:
        return "efficient", False
    same = spec.qk_head_dim == spec.value_head_dim <= 256
    return ("flash", True) if dtype.is_half and same else ("efficient", True)


def attentions(spec: ModelSpec, config: TrainConfig) -> Iterator[AttentionWork]:
    """Attention of one micro-step, layers of equal window together."""
    windows: dict[int | None, int] = {}
    for layer in range(spec.num_hidden_layers):
        window = spec.layer_window(layer)
        windows[window] = windows.get(window, 0) + 1
    tokens, dtype = config.seq_len, attention_dtype(config)
    for window, count in windows.items():
        kernel, skips = attention_kernel(spec, config, window)
        seen = min(tokens, window) if kernel == "flash" and window is not None else tokens
        pairs = config.micro_batch_size * spec.num_attention_heads * tokens * seen
        flops = 2 * pairs * (spec.qk_head_dim + spec.value_head_dim) * count
        if skips and seen == tokens:
            flops //= 2
        backward = flops * 2 if kernel == "eager" else flops * 5 // 2
        yield AttentionWork(flops, kernel, dtype, count, tokens, "forward")
        yield AttentionWork(backward, kernel, dtype, count, tokens, "backward")
        if config.gradient_checkpointing:
            yield AttentionWork(flops, kernel, dtype, count, tokens, "recompute")
