"""What holds for every model and every run: sums, signs, order of tiers, and which way each knob turns the total."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan import ModelSpec, estimate
from memplan.errors import MemplanError
from memplan.estimate import Estimate, make_config
from memplan.memory.optimizers import OPTIMIZERS
from memplan.train_config import TrainConfig

quick = settings(max_examples=40, deadline=None)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Llama's shape in small: heads in groups, tied or not, with biases or not."""
    num_kv_heads, groups = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    return ModelSpec.from_hf_config(
        {
            "model_type": draw(st.sampled_from(["llama", "qwen2", "qwen3", "mistral"])),
            "hidden_size": 64 * draw(st.integers(2, 8)),
            "intermediate_size": 32 * draw(st.integers(4, 24)),
            "num_hidden_layers": draw(st.integers(1, 4)),
            "num_attention_heads": num_kv_heads * groups,
            "num_key_value_heads": num_kv_heads,
            "head_dim": 8 * draw(st.integers(2, 16)),
            "vocab_size": draw(st.integers(200, 5000)),
            "max_position_embeddings": 4096,
            "sliding_window": None,
            "tie_word_embeddings": draw(st.booleans()),
        }
    )


@st.composite
def runs(draw: st.DrawFn, **fixed: Any) -> dict[str, Any]:
    """Fields of a run that can be made."""
    checkpointing = draw(st.booleans())
    fields: dict[str, Any] = {
        "method": draw(st.sampled_from(["full", "lora", "qlora"])),
        "stack": draw(st.sampled_from(["torch", "trainer", "trl"])),
        "micro_batch_size": draw(st.integers(1, 4)),
        "seq_len": draw(st.integers(2, 300)),
        "gradient_accumulation_steps": draw(st.integers(1, 2)),
        "padding": draw(st.booleans()),
        "gradient_checkpointing": checkpointing,
        "reentrant": checkpointing and draw(st.booleans()),
        "attention": draw(st.sampled_from(["sdpa", "eager"])),
        "weight_dtype": draw(st.sampled_from(["bf16", "fp32"])),
        "autocast": draw(st.booleans()),
        "optimizer": draw(st.sampled_from(sorted(OPTIMIZERS))),
        **fixed,
    }
    if fields["method"] != "full":
        fields |= {"rank": draw(st.integers(1, 64)), "lora_dropout": draw(st.sampled_from([0.0, 0.1]))}
    return fields


@quick
@given(spec=specs(), fields=runs())
def test_components_are_parts_of_the_whole(spec: ModelSpec, fields: dict[str, Any]) -> None:
    made = estimate(spec, **fields)
    assert min(made.components.values()) >= 0
    assert sum(made.components.values()) == made.allocated_bytes
    assert made.tensor_bytes <= made.allocated_bytes <= made.reserved_bytes <= made.process_bytes
    assert made.allocated_bytes == max(made.phases.values())
    assert made.bytes_of("weights") + made.bytes_of("adapters") <= made.allocated_bytes


def tensor_bytes(spec: ModelSpec, fields: dict[str, Any], **changes: Any) -> int:
    return estimate(spec, **{**fields, **changes}).tensor_bytes


@quick
@given(spec=specs(), fields=runs(), more=st.integers(1, 3))
def test_a_larger_batch_takes_no_less(spec: ModelSpec, fields: dict[str, Any], more: int) -> None:
    larger = fields["micro_batch_size"] + more
    assert tensor_bytes(spec, fields) <= tensor_bytes(spec, fields, micro_batch_size=larger)


@quick
@given(spec=specs(), fields=runs(), more=st.integers(1, 200))
def test_longer_sequences_take_no_less(spec: ModelSpec, fields: dict[str, Any], more: int) -> None:
    assert tensor_bytes(spec, fields) <= tensor_bytes(spec, fields, seq_len=fields["seq_len"] + more)


@quick
@given(spec=specs(), fields=runs(method="lora") | runs(method="qlora"), more=st.integers(1, 64))
def test_a_higher_rank_takes_no_less(spec: ModelSpec, fields: dict[str, Any], more: int) -> None:
    """But for 8-bit optimizers: a matrix that reaches 4096 elements has its states in 8 bits instead of 32."""
    assume(not fields["optimizer"].endswith("8bit"))
    higher = fields["rank"] + more
    assert tensor_bytes(spec, fields) <= tensor_bytes(spec, fields, rank=higher)
    small, large = estimate(spec, **fields), estimate(spec, **{**fields, "rank": higher})
    for component in ("adapters", "gradients", "optimizer_states"):
        assert small.bytes_of(component) <= large.bytes_of(component)
    assert small.num_params - small.num_trainable_params == large.num_params - large.num_trainable_params


@quick
@given(spec=specs(), fields=runs(rank=4, stack="torch", lora_dropout=0.0))
def test_each_method_keeps_less_than_the_one_before(spec: ModelSpec, fields: dict[str, Any]) -> None:
    """k-bit preparation apart, which makes embeddings and head fp32 and so can take more than it saves."""
    shared = {name: value for name, value in fields.items() if name not in ("method", "rank", "lora_dropout")}
    full = estimate(spec, method="full", **shared)
    lora = estimate(spec, method="lora", rank=4, adapter_dtype=fields["weight_dtype"], **shared)
    qlora = estimate(spec, method="qlora", rank=4, adapter_dtype=fields["weight_dtype"], kbit_prep=False, **shared)
    assert qlora.bytes_of("weights") <= lora.bytes_of("weights") == full.bytes_of("weights")
    for component in ("gradients", "optimizer_states"):
        assert qlora.bytes_of(component) <= lora.bytes_of(component)
    assert qlora.num_params == lora.num_params
    assert qlora.num_trainable_params == lora.num_trainable_params < full.num_params


def resident_bytes(made: Estimate) -> int:
    return sum(made.bytes_of(name) for name in ("weights", "adapters", "gradients", "optimizer_states"))


@quick
@given(spec=specs(), fields=runs())
def test_what_is_not_said_comes_from_the_stack(spec: ModelSpec, fields: dict[str, Any]) -> None:
    """A run that is told in full is the run that its own fields tell."""
    config = make_config(None, **fields)
    again = TrainConfig(**config.model_dump(exclude=_unused(config)))
    assert estimate(spec, config).allocated_bytes == estimate(spec, again).allocated_bytes
    assert resident_bytes(estimate(spec, config)) == resident_bytes(estimate(spec, again))


def _unused(config: TrainConfig) -> set[str]:
    return set() if config.trains_adapters else {"rank"}


values = (
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8)
    | st.lists(st.integers(), max_size=2) | st.sampled_from(["full", "lora", "fp16", "eager", "adamw_torch"])
)  # fmt: skip
SPEC = ModelSpec.from_hf_config(
    {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 200,
     "num_attention_heads": 4}
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(fields=st.dictionaries(st.sampled_from([*TrainConfig.model_fields, "typo"]), values, min_size=1, max_size=4))
def test_any_options_give_an_estimate_or_a_clean_error(fields: dict[str, Any]) -> None:
    refused = ""
    try:
        made = estimate(SPEC, **{"seq_len": 16, **fields})
    except MemplanError as error:
        refused = error.message
    assert "\n" not in refused
    assert refused or 0 < made.tensor_bytes <= made.allocated_bytes
    assert refused or "typo" not in fields


@quick
@given(
    field=st.sampled_from(["micro_batch_size", "seq_len", "rank", "gradient_accumulation_steps"]),
    value=st.integers(max_value=0) | st.floats(allow_nan=True).filter(lambda x: x != x or x % 1) | st.text(max_size=4),
)
def test_counts_are_positive_whole_numbers(field: str, value: Any) -> None:
    assume(not (isinstance(value, str) and value.strip().lstrip("+").isdigit()))
    with pytest.raises(MemplanError, match=field):
        estimate(SPEC, method="lora", **{field: value})
