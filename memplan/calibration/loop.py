"""The plain PyTorch loop: forward, backward, clip, optimizer step, zero_grad."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from memplan.calibration.losses import compute_loss
from memplan.calibration.meter import Meter
from memplan.calibration.optimizers import make_optimizer
from memplan.train_config import TrainConfig


@dataclass
class Trained:
    """What a stack's steps leave for the record."""

    optimizer: Any
    step_seconds: list[float]


def make_batch(config: TrainConfig, vocab_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Token ids and labels `(micro_batch_size, seq_len)`, int64; with `padding` also a right-padded mask.

    Padding leaves the last quarter of the first row out, so that no kernel may take the batch for a full one.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (config.micro_batch_size, config.seq_len)
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if config.padding:
        mask = torch.ones_like(ids)
        mask[0, padded_length(config.seq_len) :] = 0
        batch["attention_mask"] = mask
        batch["labels"][mask == 0] = -100
    return {name: tensor.to(device) for name, tensor in batch.items()}


def padded_length(seq_len: int) -> int:
    """Tokens of the one short row of a padded batch: three quarters, at least one less than the others."""
    return seq_len - max(1, seq_len // 4)


def train(
    model: Any, config: TrainConfig, meter: Meter, *, num_steps: int, around_step: Callable[[int, bool], None]
) -> Trained:
    """Run `num_steps` optimizer steps; `around_step(step, begins)` is called before and after each.

    Lifetimes are those of the loop one writes by hand: `outputs` is gone before backward, the loss after it,
    one batch lives throughout, gradients are set to None.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(config.optimizer, trained)
    batch = make_batch(config, model.config.get_text_config().vocab_size, meter.device)
    seconds = []
    for step in range(1, num_steps + 1):
        around_step(step, True)
        meter.synchronize()
        began = time.perf_counter()
        for micro_step in range(config.gradient_accumulation_steps):
            meter.begin("forward", step, micro_step)
            loss = _forward(model, batch, config, meter.device)
            meter.begin("backward", step, micro_step)
            loss.backward()
            meter.end()
            # What the graph still holds goes with it: neither clipping nor the optimizer sees it.
            del loss
        if config.max_grad_norm > 0:
            meter.begin("clip", step)
            torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        meter.begin("optimizer", step)
        optimizer.step()
        meter.begin("zero", step)
        optimizer.zero_grad(set_to_none=True)
        meter.end()
        meter.synchronize()
        seconds.append(time.perf_counter() - began)
        around_step(step, False)
    return Trained(optimizer=optimizer, step_seconds=seconds)


def _forward(model: Any, batch: dict[str, torch.Tensor], config: TrainConfig, device: torch.device) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
        loss = compute_loss(model, batch, config)
    return loss / config.gradient_accumulation_steps if config.gradient_accumulation_steps > 1 else loss
