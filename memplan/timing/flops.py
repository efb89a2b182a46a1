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

import re
from collections.abc import Iterator
from dataclasses import dataclass

from memplan.architectures.builder import Weight
from memplan.dtypes import DType
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

# Looked up by row, not multiplied: token, position and type tables as transformers 5.17 names them.
_LOOKUP = re.compile(r"(^|\.)(embed_tokens|embed_positions|wte|wpe|word_embeddings|embed_in|embed_tokens_per_layer)\.")
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")


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
    """`base`, `adapter`, `head` or `experts`."""
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


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear layers of one shape, as many as the model has."""

    out_features: int
    in_features: int
    experts: int
    part: str
    trains: bool
    stored_bytes: int
    count: int
    in_layers: bool
    last: int
    """How many of them are the last product of their layer, which recomputation stops before."""

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features * self.experts


def linears(weights: list[Weight], spec: ModelSpec, config: TrainConfig) -> list[Linear]:
    """The linear layers behind `weights`, equal ones together; a tied head once more."""
    last = _last_of_each_layer(weights)
    counts: dict[tuple[int, int, int, str, bool, int, bool], list[int]] = {}
    for w in weights:
        if w.buffer or len(w.shape) not in (2, 3) or _LOOKUP.search(w.name):
            continue
        *experts, out_features, in_features = w.shape
        in_layers = _LAYER.match(w.name) is not None
        part = _part(w, bool(experts), in_layers, spec)
        key = out_features, in_features, experts[0] if experts else 1, part, w.trains, sum(w.stored), in_layers
        entry = counts.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += w.name in last
    if spec.tie_word_embeddings:
        trains = config.method == "full"
        counts[(spec.vocab_size, spec.hidden_size, 1, "head", trains, 0, False)] = [1, 0]
    return [Linear(*key[:6], count, key[6], last_count) for key, (count, last_count) in counts.items()]


def _part(w: Weight, is_expert: bool, in_layers: bool, spec: ModelSpec) -> str:
    if w.kind == "adapters":
        return "adapter"
    if is_expert:
        return "experts"
    return "head" if not in_layers and spec.vocab_size in w.shape else "base"


def _last_of_each_layer(weights: list[Weight]) -> set[str]:
    """Names of the base weights that come last in their layer; none where adapters follow them."""
    if any(w.kind == "adapters" for w in weights):
        return set()
    last: dict[str, str] = {}
    for w in weights:
        found = _LAYER.match(w.name)
        if found is not None and len(w.shape) in (2, 3):
            last[found[0]] = w.name
    return set(last.values())


def matmul_dtype(part: str, config: TrainConfig) -> DType:
    """dtype in which a linear layer multiplies."""
    if config.autocast:
        return DType.bf16
    if part == "adapter":
        return DType[config.adapter_dtype]
    if config.method == "qlora":
        if part == "base":
            return DType.bf16
        return DType.fp32 if config.kbit_prep else DType[config.weight_dtype]
    return DType[config.weight_dtype]


def matmuls(layers: list[Linear], spec: ModelSpec, config: TrainConfig) -> Iterator[Matmul]:
    """The products of one micro-step."""
    tokens = config.tokens_per_micro_batch
    for linear in layers:
        rows = tokens * (spec.num_experts_per_tok if linear.part == "experts" else 1)
        dtype = matmul_dtype(linear.part, config)

        def product(phase: str, count: int, *, rows: int = rows, dtype: DType = dtype, of: Linear = linear) -> Matmul:
            return Matmul(rows, of.out_features, of.in_features, dtype, count, phase, of.part, of.experts)

        yield product("forward", linear.count)
        yield product("dx", linear.count)
        if linear.trains:
            yield product("dw", linear.count)
        if config.gradient_checkpointing and linear.in_layers:
            yield product("recompute", linear.count - (0 if config.reentrant else linear.last))
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
