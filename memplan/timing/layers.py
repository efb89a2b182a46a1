"""The linear layers of a run, read off its weights: what multiplies, in which dtype, and what trains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from memplan.architectures.builder import Weight
from memplan.dtypes import DType
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

# Looked up by row, not multiplied: token and position tables as transformers 5.17 names them.
_LOOKUP = re.compile(r"(^|\.)(embed_tokens|embed_tokens_per_layer|embed_positions|wte|wpe|word_embeddings|embed_in)\.")
# Weights of convolutions of each channel by itself, which are no matrices.
_CONVOLUTION = re.compile(r"\.conv1d\.")
_ON_EVERY_TOKEN = frozenset({"llama4_text"})
"""Model types whose experts are a torch.bmm over all tokens (architectures/llama4_moe.py)."""
_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_COPY = ".modules_to_save"


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear layers of one shape, as many as the model has."""

    out_features: int
    in_features: int
    groups: int
    """Experts; 1 for an ordinary layer."""
    rank: int
    """Of a `delta`; 0 otherwise."""
    part: str
    """`base`, `head`, `experts`, `batched` (experts that all tokens go through, in one kernel), `adapter`, or `delta`:
    an adapter that is added to a bare parameter before it multiplies (PEFT 0.21.2 tuners/lora/layer.py
    `ParamWrapper`)."""
    dtype: DType
    """dtype in which it multiplies."""
    needs_dw: bool
    """It trains, or the weight it multiplies with is made from something that does."""
    stored_bytes: int
    """Of a quantised weight."""
    in_layers: bool
    count: int = 1
    last: int = 0
    """How many of them are the last product of their layer, which recomputation stops before."""

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features * self.groups


def linears(weights: list[Weight], spec: ModelSpec, config: TrainConfig) -> list[Linear]:
    """The linear layers behind `weights`, equal ones together; a tied head once more."""
    last = _last_of_each_layer(weights)
    counts: dict[Linear, list[int]] = {}
    for name, linear in _each(weights, spec, config):
        entry = counts.setdefault(linear, [0, 0])
        entry[0] += 1
        entry[1] += name in last
    return [replace(linear, count=count, last=num_last) for linear, (count, num_last) in counts.items()]


def _each(weights: list[Weight], spec: ModelSpec, config: TrainConfig) -> Iterator[tuple[str, Linear]]:
    """Every linear layer by the name of its weight."""
    by_name = {w.name: w for w in weights}
    copied = {w.name.replace(_COPY, "") for w in weights if _COPY in w.name}
    bare = {base for w in weights if (base := w.name.partition(".lora_A")[0]) != w.name and base in by_name}
    for w in weights:
        if w.buffer or len(w.shape) not in (2, 3) or w.name in copied:
            continue
        if _LOOKUP.search(w.name) or _CONVOLUTION.search(w.name):
            continue
        base = w.name.partition(".lora_")[0]
        if base in bare and base != w.name:
            if ".lora_A" in w.name:
                yield w.name, _delta(w, by_name[base], config)
            continue
        *experts, out_features, in_features = w.shape
        in_layers = _LAYER.match(w.name) is not None
        of_experts = "batched" if spec.model_type in _ON_EVERY_TOKEN else "experts"
        part = "adapter" if base != w.name else of_experts if experts else "base"
        if part == "base" and not in_layers and spec.vocab_size in w.shape:
            part = "head"
        needs_dw = w.learns or w.name in bare
        dtype, stored = _dtype(w, part, config), sum(w.stored)
        groups = experts[0] if experts else 1
        yield w.name, Linear(out_features, in_features, groups, 0, part, dtype, needs_dw, stored, in_layers)
    if spec.tie_word_embeddings:
        table = next(w for w in weights if _LOOKUP.search(w.name) and not w.buffer)
        dtype, trains = _dtype(table, "head", config), table.trains
        yield "", Linear(spec.vocab_size, spec.hidden_size, 1, 0, "head", dtype, trains, 0, in_layers=False)


def _delta(lora_a: Weight, base: Weight, config: TrainConfig) -> Linear:
    *experts, out_features, in_features = base.shape
    groups = experts[0] if experts else 1
    dtype, rank = _dtype(lora_a, "delta", config), lora_a.shape[0] // groups
    in_layers = _LAYER.match(base.name) is not None
    return Linear(out_features, in_features, groups, rank, "delta", dtype, True, 0, in_layers)


def _dtype(w: Weight, part: str, config: TrainConfig) -> DType:
    """bf16 under autocast (which does not know grouped products) and for 4-bit weights, else the weight's own."""
    if w.stored or (config.autocast and part != "experts"):
        return DType.bf16
    return w.dtype


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
