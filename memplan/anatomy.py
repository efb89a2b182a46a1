"""One model taken apart: its parameters by part, what one layer keeps of a token, and what its user should know."""

from __future__ import annotations

from dataclasses import dataclass

from memplan.architectures import decoder_for
from memplan.architectures.builder import Weight
from memplan.errors import MemplanError
from memplan.estimate import Estimate
from memplan.memory.composer import Composer
from memplan.memory.segment import PORT_X, Segment
from memplan.model_spec import ModelSpec
from memplan.prequantized import storage_fields, storage_warnings, told
from memplan.train_config import METHODS, Method, TrainConfig
from memplan.units import exact_percent, human

SEQ_LEN = 1024
_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed", "wte", "wpe", "project_in", "project_out")
_UNQUANTISED_SHARE = 0.1
_LARGE_VOCABULARY = 100_000


@dataclass(frozen=True, slots=True)
class Anatomy:
    """`parts` sum to the model's parameters."""

    parts: dict[str, int]
    kept_per_token: dict[Method, dict[str, int]]
    """By method and kind of layer: bytes that the layer keeps for backward of each token, its input included and its
    output not, in sequences of SEQ_LEN tokens without gradient checkpointing."""
    checkpointed_per_token: dict[Method, int]
    """The same with gradient checkpointing, of any layer: its input."""
    num_layers: dict[str, int]
    """Layers of each kind."""
    pitfalls: tuple[str, ...]


def anatomy(spec: ModelSpec) -> Anatomy:
    """Takes `spec` apart, as TRL's SFTTrainer runs it at rank 16 and in bf16 autocast.

    Raises:
        MemplanError: its family is not modelled, or its activation.
    """
    plain = spec.model_copy(update={"quantization_config": None})
    kept = {method: _kept(plain, TrainConfig(method=method, gradient_checkpointing=False)) for method in METHODS}
    inputs = {method: _kept(plain, TrainConfig(method=method, gradient_checkpointing=True)) for method in METHODS}
    decoder = decoder_for(plain, TrainConfig(method="full"))
    kinds = [decoder.layer_kind(index) for index in range(spec.num_hidden_layers)]
    whole = Estimate(plain, TrainConfig(method="full"), None)
    return Anatomy(
        parts=_parts(whole.program.weights),
        kept_per_token=kept,
        checkpointed_per_token={method: next(iter(by_kind.values())) for method, by_kind in inputs.items()},
        num_layers={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        pitfalls=tuple(_pitfalls(spec, plain)),
    )


def _parts(weights: list[Weight]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for weight in weights:
        if not weight.buffer:
            name = part_of(weight.name)
            parts[name] = parts.get(name, 0) + weight.numel
    return {name: parts[name] for name in _ORDER if name in parts}


_ORDER = (
    "embedding", "attention", "mlp", "experts", "shared experts", "router", "streams", "per-layer inputs", "norms",
    "head",
)  # fmt: skip


def part_of(name: str) -> str:
    """The part that the weight `name` belongs to, by the names that transformers gives."""
    module = name.rpartition(".")[0]
    steps = module.split(".")
    if steps[0] in _HEADS:
        return "head"
    if "norm" in steps[-1] or steps[-1].startswith("ln_"):
        return "norms"
    if any(step.startswith("shared_expert") for step in steps):
        return "shared experts"
    if "experts" in steps:
        return "experts"
    if steps[-1] == "gate" or "router" in steps:
        return "router"
    if any(step.startswith("altup") for step in steps):
        return "streams"
    if any("attn" in step or "attention" in step for step in steps):
        return "attention"
    if any(word in step for step in steps for word in _EMBEDDINGS):
        return "embedding"
    if any(step.startswith("per_layer") for step in steps):
        return "per-layer inputs"
    return "mlp"


def _kept(spec: ModelSpec, config: TrainConfig) -> dict[str, int]:
    """What one more sequence adds, by its tokens: what is there once whatever the batch (weights cast by autocast)
    drops out."""
    one, two = (_alive_by_kind(spec, config.but(micro_batch_size=n, seq_len=SEQ_LEN)) for n in (1, 2))
    return {kind: round((two[kind] - one[kind]) / SEQ_LEN) for kind in one}


def _alive_by_kind(spec: ModelSpec, config: TrainConfig) -> dict[str, int]:
    decoder = decoder_for(spec, config)
    layers = Composer(decoder, workspace_bytes=0).record(accumulating=False).layers
    # The last of a kind: the first layer's input may be held by the model itself.
    return {decoder.layer_kind(index): _alive(segment) for index, segment in enumerate(layers)}


def _alive(segment: Segment) -> int:
    """Bytes from the layer's forward that are alive when backward begins."""
    alive = {PORT_X: segment.sizes[PORT_X]}
    for tape in (segment.forward, segment.after_next, segment.after_forward, segment.after_model):
        for slot, size in tape:
            if size:
                alive[slot] = size
            else:
                alive.pop(slot, None)
    alive.pop(segment.out_slot, None)
    return sum(alive.values())


def _pitfalls(spec: ModelSpec, plain: ModelSpec) -> list[str]:
    """What estimates with the default settings warn of, and what of the model itself decides memory unexpectedly."""
    found: dict[str, None] = dict.fromkeys(spec.left_out)
    try:
        stored = storage_fields(spec)
        found.update(dict.fromkeys(storage_warnings(spec, TrainConfig(**stored))))
        if stored:
            found[f"the checkpoint comes quantised by bitsandbytes: any run of it is qlora ({told(stored)})"] = None
    except MemplanError as refusal:
        found[refusal.message] = None
    for method in ("lora", "qlora"):
        run = Estimate(plain, TrainConfig(method=method), None)
        found.update(dict.fromkeys(run.warnings))
    share = _unquantised_share(run)
    if share > _UNQUANTISED_SHARE and not spec.is_moe:
        text = f"bitsandbytes leaves {exact_percent(share, 0)} of the parameters unquantised: embedding, head, norms"
        found[text] = None
    if spec.vocab_size >= _LARGE_VOCABULARY:
        text = (
            f"{spec.vocab_size:,} logits a token: the loss `full` makes {human(spec.vocab_size * (2 + 4))} of them for "
            "each, in bf16 and again in fp32; `chunked` and `liger` make those of few tokens at a time"
        )
        found[text] = None
    return list(found)


def _unquantised_share(run: Estimate) -> float:
    base = [w for w in run.program.weights if w.kind == "weights" and not w.buffer]
    return sum(w.numel for w in base if not w.stored) / sum(w.numel for w in base)
