"""Draws the runs to measure: a seed gives the same list of cases everywhere. Needs no torch.

`python -m memplan.calibration.design --seed 7 --num-cases 120 --max-gib 70 --out cases.json`

Families, methods and stacks come round in turn, so that each is measured; the other knobs are drawn. A case
that is too big for the card, or too slow, is made smaller step by step, never thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from memplan.calibration.design_models import FAMILIES, Shape, hf_config, num_params
from memplan.calibration.record import Case, write_cases
from memplan.errors import MemplanError
from memplan.train_config import TrainConfig
from memplan.units import GIB

BytesOf = Callable[[dict[str, Any], TrainConfig], int]

# hidden, heads, head_dim; intermediate is drawn apart. Widths of published models from 0.1B to 8B.
_WIDTHS = ((576, 9, 64), (768, 12, 64), (1024, 16, 64), (1536, 12, 128), (2048, 32, 64), (2560, 20, 128),
           (3072, 24, 128), (4096, 32, 128))  # fmt: skip
_VOCABS = (32000, 50304, 65024, 102400, 128256, 151936, 201088, 256000)
_SEQ_LENS = (256, 500, 512, 1000, 1024, 2048, 3000, 4096, 8192, 16384)
METHODS = ("lora", "qlora", "full", "lora", "qlora")  # adapters twice: they have more knobs
STACKS = ("torch", "trainer", "trl")
_FULL_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adafactor", "sgd", "lion_8bit")
_ADAPTER_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor")
# A step at this rate: low, for short kernels and 4-bit weights; it only bounds how long a case may take.
SLOW_FLOPS_PER_SECOND = 5e13


def draw(
    seed: int,
    num_cases: int,
    *,
    max_bytes: int,
    max_seconds: float = 4.0,
    families: Iterable[str] | None = None,
    stacks: Iterable[str] = STACKS,
    bytes_of: BytesOf | None = None,
) -> list[Case]:
    """`num_cases` cases that take at most `max_bytes` and about `max_seconds` of steps each.

    Args:
        families: model types to draw from; all unless told.
        bytes_of: predicted bytes of `(hf_config, config)`; a generous sum of components unless told.
    """
    rng = random.Random(seed)
    kinds = sorted(FAMILIES if families is None else families)
    combinations = [(method, stack) for method in METHODS for stack in stacks]
    rng.shuffle(kinds)
    rng.shuffle(combinations)
    cases = []
    for number in range(num_cases):
        model_type = kinds[number % len(kinds)]
        # Offset by the round, so that a family meets another combination each time.
        method, stack = combinations[(number + number // len(kinds)) % len(combinations)]
        shape = _draw_shape(rng, model_type)
        said = draw_config(rng, model_type, method, stack)
        shape, said = _shrink(model_type, shape, said, max_bytes, max_seconds, bytes_of)
        name = f"d{seed}-{number:03d}-{model_type}-{method}-{stack}"
        cases.append(Case(id=name, hf_config=hf_config(model_type, shape), config=said))
    return cases


def rough_bytes(model_type: str, shape: Shape, config: TrainConfig) -> int:
    """A generous bound of the peak, to keep a design within a card: not an estimate of anything."""
    params = num_params(model_type, shape)
    tokens = config.tokens_per_micro_batch
    weight = 4 if config.weight_dtype == "fp32" else 2
    embeddings = 2 * shape.vocab_size * shape.hidden_size
    if config.method == "full":
        held = params * weight * 5 + (params * 2 if config.autocast else 0)
    else:
        quantised = config.method == "qlora" and not FAMILIES[model_type].is_moe
        held = params + embeddings * 4 if quantised else params * (4 if config.method == "qlora" else 2)
        held += (config.rank or 0) * shape.num_layers * 16 * 14 * (shape.hidden_size + shape.intermediate_size)
        held += embeddings * 16 * len(config.modules_to_save)
    width = 48 * shape.hidden_size + 16 * shape.intermediate_size * (
        shape.num_experts_per_tok if FAMILIES[model_type].is_moe else 1
    )
    is_eager = config.attention == "eager" or not FAMILIES[model_type].has_sdpa
    scores = 10 * shape.num_heads * config.seq_len if is_eager else 0
    layers = 2 if config.gradient_checkpointing else shape.num_layers
    logits = 16 * shape.vocab_size if config.loss == "full" else 0
    kept = tokens * (layers * (width + scores) + shape.num_layers * 4 * shape.hidden_size + logits)
    return held + kept + 2 * GIB


def _draw_shape(rng: random.Random, model_type: str) -> Shape:
    hidden, heads, head_dim = rng.choice(_WIDTHS)
    groups = rng.choice([g for g in (1, 2, 4, 8) if heads % g == 0])
    ratio = rng.choice((0.5, 0.75, 1.0) if FAMILIES[model_type].is_moe else (2.6875, 3.5, 4.0))
    return Shape(
        hidden_size=hidden,
        intermediate_size=int(hidden * ratio) // 64 * 64,
        num_layers=rng.choice((2, 4, 6, 8, 12, 16)),
        num_heads=heads,
        num_kv_heads=heads // groups,
        head_dim=head_dim,
        vocab_size=rng.choice(_VOCABS),
        num_experts=rng.choice((4, 8, 16)),
        num_experts_per_tok=rng.choice((2, 4)),
    )


def draw_config(rng: random.Random, model_type: str, method: str, stack: str) -> dict[str, Any]:
    """Fields of a TrainConfig; about half of the knobs stay at what the stack sets."""
    said: dict[str, Any] = {"method": method, "stack": stack, "seq_len": rng.choice(_SEQ_LENS)}
    said["micro_batch_size"] = rng.choice((1, 1, 2, 3, 4, 8, 16))
    if rng.random() < 0.25:
        said["gradient_accumulation_steps"] = rng.choice((2, 4))
    if rng.random() < 0.5:
        said["gradient_checkpointing"] = rng.random() < 0.6
        if said["gradient_checkpointing"] and rng.random() < 0.15:
            said["reentrant"] = True
    if FAMILIES[model_type].has_sdpa and rng.random() < 0.12:
        said["attention"] = "eager"
        said["seq_len"] = min(said["seq_len"], 2048)
    if said["micro_batch_size"] > 1 and rng.random() < 0.2:
        said["padding"] = True
    if rng.random() < 0.15:
        said["max_grad_norm"] = 0.0
    if rng.random() < 0.5:
        said["optimizer"] = rng.choice(_FULL_OPTIMIZERS if method == "full" else _ADAPTER_OPTIMIZERS)
    if method == "full":
        said |= rng.choice(({"weight_dtype": "bf16", "autocast": False}, {"weight_dtype": "bf16"},
                            {"weight_dtype": "fp32", "autocast": True},
                            {"weight_dtype": "fp32", "autocast": False}, {}))  # fmt: skip
    else:
        said |= _draw_adapters(rng, model_type, method, stack)
    return said


def _draw_adapters(rng: random.Random, model_type: str, method: str, stack: str) -> dict[str, Any]:
    said: dict[str, Any] = {"rank": rng.choice((4, 8, 16, 16, 32, 64, 128))}
    is_moe = FAMILIES[model_type].is_moe
    if rng.random() < 0.06:
        said["use_dora"] = True
    if rng.random() < 0.06 and FAMILIES[model_type].head and stack != "trl":
        said["modules_to_save"] = [FAMILIES[model_type].head]
    if rng.random() < 0.1:
        said["adapter_dtype"] = rng.choice(("bf16", "fp32"))
    if rng.random() < 0.3:
        said["target_modules"] = list(FAMILIES[model_type].attention_modules)
    if rng.random() < 0.3:
        said["lora_dropout"] = rng.choice((0.05, 0.1))
    if rng.random() < 0.3:
        said["autocast"] = rng.random() < 0.5
    if method == "lora" and stack == "torch" and rng.random() < 0.15:
        said |= {"weight_dtype": "fp16", "autocast": False}
    if method == "qlora":
        kind = rng.choice(("nf4", "nf4", "nf4", "fp4", "int8"))
        if kind != "nf4":
            said["quant_type"] = kind
        if rng.random() < 0.3 or kind == "int8":
            said["double_quant"] = False
        if rng.random() < 0.3:
            said["kbit_prep"] = rng.random() < 0.5
    if is_moe and "target_modules" not in said:
        # PEFT 0.21's wrapper of a stack of experts (lora/layer.py `ParamWrapper`) refuses both.
        said.pop("lora_dropout", None)
        said.pop("use_dora", None)
    if said.get("quant_type") == "int8":
        said.pop("use_dora", None)  # its first forward fails in bitsandbytes 0.50
    return said


def _shrink(
    model_type: str, shape: Shape, said: dict[str, Any], max_bytes: int, max_seconds: float,
    bytes_of: BytesOf | None,
) -> tuple[Shape, dict[str, Any]]:  # fmt: skip
    """The case within its bounds: fewer tokens first, then less depth, vocabulary and width."""
    while True:
        config = TrainConfig(**said)
        if bytes_of is None:
            num_bytes = rough_bytes(model_type, shape, config)
        else:
            num_bytes = bytes_of(hf_config(model_type, shape), config)
        tokens = config.tokens_per_micro_batch * config.gradient_accumulation_steps
        seconds = 3 * 8 * num_params(model_type, shape) * tokens / SLOW_FLOPS_PER_SECOND
        if num_bytes <= max_bytes and seconds <= max_seconds:
            return shape, said
        shape, said = _smaller(shape, said, config)


def _smaller(shape: Shape, said: dict[str, Any], config: TrainConfig) -> tuple[Shape, dict[str, Any]]:
    if config.gradient_accumulation_steps > 1:
        return shape, {name: value for name, value in said.items() if name != "gradient_accumulation_steps"}
    if config.micro_batch_size > 2:
        return shape, {**said, "micro_batch_size": max(2, config.micro_batch_size // 2)}
    if config.seq_len > 512:
        return shape, {**said, "seq_len": config.seq_len // 2}
    if shape.num_layers > 2:
        return replace(shape, num_layers=max(2, shape.num_layers // 2)), said
    if shape.vocab_size > 16000:
        return replace(shape, vocab_size=shape.vocab_size // 2), said
    if shape.hidden_size > 1024:
        heads = (shape.num_heads // 2, max(1, shape.num_kv_heads // 2))
        halved = replace(shape, hidden_size=shape.hidden_size // 2, num_heads=heads[0], num_kv_heads=heads[1])
        return replace(halved, intermediate_size=shape.intermediate_size // 2), said
    raise MemplanError("not even a small model fits these bounds", hints=["raise --max-gib or --max-seconds"])


def main(
    seed: Annotated[int, typer.Option(help="The same seed draws the same cases.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    num_cases: Annotated[int, typer.Option(help="How many cases.")] = 100,
    max_gib: Annotated[float, typer.Option(help="What a case may take, in GiB.")] = 70.0,
    max_seconds: Annotated[float, typer.Option(help="Seconds its steps may take.")] = 4.0,
) -> None:
    """Draw a design and write it."""
    write_cases(draw(seed, num_cases, max_bytes=int(max_gib * GIB), max_seconds=max_seconds), out)


if __name__ == "__main__":
    typer.run(main)
