"""Matrix products and attention of one training step.

forward        2 * rows * out * in                       every linear layer, routed experts by their active rows
                                                         (llama4's by all rows)
dX             the same                                  wherever a gradient is passed on
dW             the same                                  trained weights only: LoRA leaves it out for its base
recompute      forward once more                         each layer, under gradient checkpointing
attention      4 * B * heads * S**2 * head_dim forward, 2.5 times that in backward (it recomputes the scores);
               half of both where the kernel skips what the causal mask hides; twice the forward in backward where
               attention is matrix products
               (Dao et al. 2022, "FlashAttention", section 3 and appendix B; Dao 2023, section 3.1)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memplan.dtypes import DType
from memplan.model_spec import ModelSpec
from memplan.ops.delta_rule import CHUNK_SIZE
from memplan.ops.loss_liger import builds_logits
from memplan.ops.tensor import AttentionCall
from memplan.timing.layers import Linear
from memplan.train_config import TrainConfig

PIECES = ("forward", "loss", "loss_backward", "backward")
"""A micro-step in the order in which it runs. The output head goes with the loss: few kernels and long ones, between
the layers' many short ones."""


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
    piece: str = "forward"
    """Of the micro-step, one of `PIECES`."""
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
    call: AttentionCall
    count: int
    seq_len: int
    phase: str

    @property
    def piece(self) -> str:
        return "forward" if self.phase == "forward" else "backward"


def matmuls(layers: list[Linear], spec: ModelSpec, config: TrainConfig) -> Iterator[Matmul]:
    """The products of one micro-step."""
    tokens = config.tokens_per_micro_batch
    # Liger's loss has its gradients before backward begins
    at_once = config.loss == "liger" and not builds_logits(config.loss, spec.model_type)
    for linear in layers:
        rows = tokens * {"experts": spec.num_experts_per_tok, "batched": linear.groups}.get(linear.part, 1)
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
            return Matmul(*shape, of.dtype, count, phase, of.part, _piece(phase, of.part, at_once), of.groups)

        yield product("forward", linear.count * times)
        yield product("dx", linear.count)
        if linear.needs_dw:
            yield product("dw", linear.count)
        if config.gradient_checkpointing and linear.in_layers:
            yield product("recompute", (linear.count - (0 if config.reentrant else linear.last)) * times)
        if config.loss == "chunked" and linear.part == "head":  # backward makes each tile of logits again
            yield product("recompute", linear.count)


def _piece(phase: str, part: str, at_once: bool) -> str:
    if part == "head":
        return "loss" if phase == "forward" or at_once else "loss_backward"
    return "forward" if phase == "forward" else "backward"


def written_out_dtype(config: TrainConfig) -> DType:
    """dtype in which attention that a model writes out as matrix products multiplies: that of the hidden states unless
    autocast."""
    if config.autocast:
        return DType.bf16
    if config.method == "qlora" and config.kbit_prep:
        return DType.fp32
    return DType[config.weight_dtype]


def attentions(spec: ModelSpec, config: TrainConfig, calls: Sequence[AttentionCall | None]) -> Iterator[AttentionWork]:
    """Attention of one micro-step; `calls` say what each layer runs, None for matrix products of the model's own.
    Layers of equal window, kernel and heads go together."""
    written_out = AttentionCall("products", written_out_dtype(config), masked=True)
    num_linear = sum(spec.is_linear_layer(layer) for layer in range(len(calls)))
    if num_linear:
        yield from _delta_rules(spec, config, written_out, num_linear)
    kinds = Counter(
        (call or written_out, spec.layer_window(layer), _head_widths(spec, layer))
        for layer, call in enumerate(calls)
        if not spec.is_linear_layer(layer)
    )
    tokens = config.seq_len
    for (call, window, widths), count in kinds.items():
        seen = tokens if call.masked or window is None else min(tokens, window)
        pairs = config.micro_batch_size * spec.num_attention_heads * tokens * seen
        flops = 2 * pairs * widths * count
        if not call.masked and seen == tokens:
            flops //= 2
        backward = flops * 2 if call.kernel == "products" else flops * 5 // 2
        yield AttentionWork(flops, call, count, tokens, "forward")
        yield AttentionWork(backward, call, count, tokens, "backward")
        if config.gradient_checkpointing:
            yield AttentionWork(flops, call, count, tokens, "recompute")


def _head_widths(spec: ModelSpec, layer: int) -> int:
    """Width of a query and key head and of a value head, together."""
    return spec.qk_head_dim + spec.value_head_dim if spec.is_mla else 2 * spec.layer_head_dim(layer)


def _delta_rules(spec: ModelSpec, config: TrainConfig, call: AttentionCall, num_layers: int) -> Iterator[AttentionWork]:
    """The gated delta rule (ops/delta_rule.py) of `num_layers` layers, by chunks of C tokens. For each token and value
    head, K and V being the widths of a key and of a value: products 4CK + 6KV + 2CV, triangular solves C(K + V).
    Backward is two products for each product, and a solve and a product (2C(K + V)) for each solve."""
    chunk, key, value = CHUNK_SIZE, spec.linear_key_head_dim, spec.linear_value_head_dim
    tokens = -(-config.seq_len // chunk) * chunk
    rows = config.micro_batch_size * tokens * spec.linear_num_value_heads * num_layers
    products = rows * (4 * chunk * key + 6 * key * value + 2 * chunk * value)
    solves = rows * chunk * (key + value)
    yield AttentionWork(products + solves, call, num_layers, config.seq_len, "forward")
    yield AttentionWork(2 * products + 3 * solves, call, num_layers, config.seq_len, "backward")
    if config.gradient_checkpointing:
        yield AttentionWork(products + solves, call, num_layers, config.seq_len, "recompute")
