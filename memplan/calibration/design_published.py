"""Draws runs of published models to measure: what people run, where `design` draws widths and depths too.

`python -m memplan.calibration.design_published --seed 7 --num-cases 40 --gpu h100-sxm --out cases.json`

Models come in a shuffled order, methods and stacks in turn; the other knobs are drawn as in `design`. A run that is
predicted to be too big for the card gets fewer tokens, then a smaller method; a model that not even QLoRA fits is
passed over. Needs no torch.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import typer

from memplan import catalog, gpus
from memplan.calibration.design import METHODS, SLOW_FLOPS_PER_SECOND, STACKS, draw_config
from memplan.calibration.design_models import FAMILIES
from memplan.calibration.record import Case, write_cases
from memplan.errors import MemplanError
from memplan.estimate import Estimate
from memplan.gpus import GpuSpec
from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

SHARE = 0.92
"""The most of the card that a run is predicted to take."""


def draw_published(seed: int, num_cases: int, gpu: GpuSpec, *, max_seconds: float = 4.0) -> list[Case]:
    """`num_cases` runs of different published models, each predicted to fit on `gpu`.

    Raises:
        MemplanError: fewer models than that can be run within these bounds.
    """
    rng = random.Random(seed)
    models = [name for name in catalog.names() if catalog.load(name).model_type in FAMILIES]
    rng.shuffle(models)
    combinations = [(method, stack) for method in METHODS for stack in STACKS]
    rng.shuffle(combinations)
    cases: list[Case] = []
    for model in models:
        method, stack = combinations[len(cases) % len(combinations)]
        case = _case(rng, f"p{seed}-{len(cases):03d}", model, method, stack, gpu, max_seconds)
        if case is not None:
            cases.append(case)
        if len(cases) == num_cases:
            return cases
    raise MemplanError(f"only {len(cases)} models can be run within these bounds", hints=["ask for fewer cases"])


def _case(
    rng: random.Random, number: str, model: str, method: str, stack: str, gpu: GpuSpec, max_seconds: float
) -> Case | None:
    hf_config = catalog.source_config(model)
    spec = ModelSpec.from_hf_config(hf_config)
    for smaller in dict.fromkeys((method, "lora", "qlora")):
        if (smaller, method) == ("lora", "qlora"):
            continue
        said = draw_config(rng, spec.model_type, smaller, stack)
        if spec.max_position_embeddings is not None:
            said["seq_len"] = min(said["seq_len"], spec.max_position_embeddings)
        while True:
            if _fits(spec, said, gpu, max_seconds):
                name = f"{number}-{model}-{smaller}-{stack}"
                return Case(id=name, hf_config=hf_config, config=said)
            fewer = _fewer_tokens(said)
            if fewer is None:
                break
            said = fewer
    return None


def _fits(spec: ModelSpec, said: dict[str, Any], gpu: GpuSpec, max_seconds: float) -> bool:
    config = TrainConfig(**said)
    estimate = Estimate(spec, config, gpu)
    tokens = config.tokens_per_micro_batch * config.gradient_accumulation_steps
    seconds = 3 * 8 * estimate.num_params * tokens / SLOW_FLOPS_PER_SECOND
    return seconds <= max_seconds and estimate.process_bytes <= gpu.memory_bytes * SHARE


def _fewer_tokens(said: dict[str, Any]) -> dict[str, Any] | None:
    if said.get("gradient_accumulation_steps", 1) > 1:
        return {name: value for name, value in said.items() if name != "gradient_accumulation_steps"}
    if said["micro_batch_size"] > 1:
        padding = said.get("padding") and said["micro_batch_size"] // 2 > 1
        rest = {name: value for name, value in said.items() if name != "padding"}
        return {**rest, "micro_batch_size": said["micro_batch_size"] // 2, **({"padding": True} if padding else {})}
    if said["seq_len"] > 256:
        return {**said, "seq_len": said["seq_len"] // 2}
    return None


def main(
    seed: Annotated[int, typer.Option(help="The same seed draws the same cases.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    gpu: Annotated[str, typer.Option(help="The card they shall fit on.")],
    num_cases: Annotated[int, typer.Option(help="How many cases.")] = 40,
    max_seconds: Annotated[float, typer.Option(help="Seconds a case's steps may take, by a slow card's rate.")] = 30.0,
) -> None:
    """Draw a design of published models and write it."""
    write_cases(draw_published(seed, num_cases, gpus.get(gpu), max_seconds=max_seconds), out)


if __name__ == "__main__":
    typer.run(main)
