"""Steps as transformers' Trainer and TRL's SFTTrainer run them, on fake tensors.

`compute_loss`, `training_step`, `_get_num_items_in_batch` and accelerate's `backward` are the libraries' own, called
on a stand-in for the trainer that has the attributes they read (one GPU, no parallelism). The loop around them is
transcribed from `Trainer._run_epoch` (transformers 5.17), since what its locals hold decides what lives how long.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType, SimpleNamespace
from typing import Any

import torch

from tests.oracle.loop import Batch, Phases, Tensors


def make_trainer(model: Any, stack: str) -> Any:
    """What `stack`'s methods read of themselves. SFTTrainer's constructor has fixed its side of the model already."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
    from transformers import Trainer

    accelerator = SimpleNamespace(
        distributed_type=DistributedType.NO,
        gradient_accumulation_steps=1,  # Trainer scales the loss itself
        num_processes=1,
        parallelism_config=None,
        scaler=None,
        gather_for_metrics=lambda tensor: tensor,
    )
    accelerator.backward = MethodType(Accelerator.backward, accelerator)
    trainer = SimpleNamespace(
        accelerator=accelerator,
        args=SimpleNamespace(
            average_tokens_across_devices=True,
            world_size=1,
            n_gpu=1,
            optim="",
            torch_empty_cache_steps=None,
            loss_type="nll",
        ),
        model=model,
        optimizer=None,
        label_smoother=None,
        compute_loss_func=None,
        model_accepts_loss_kwargs=True,
        _loss_shifts_labels=True,
        compute_loss_context_manager=nullcontext,
        _prepare_context_parallel_inputs=lambda model, inputs: (nullcontext, inputs),
        _prepare_inputs=lambda inputs: inputs,
    )
    cls: type[Any] = Trainer
    if stack == "trl":
        from trl.trainer.sft_trainer import SFTTrainer

        cls = SFTTrainer
        config = model.config.get_text_config()
        trainer.aux_loss_enabled = getattr(config, "output_router_logits", False)
        trainer.router_aux_loss_coef = getattr(config, "router_aux_loss_coef", 0.0)
        trainer.get_tp_size = lambda: 1
        trainer._tp_size, trainer._total_train_tokens = 1, 0
        trainer._metrics = {"train": defaultdict(list)}
    trainer.compute_loss = MethodType(cls.compute_loss, trainer)
    trainer.training_step = MethodType(Trainer.training_step, trainer)
    trainer._get_num_items_in_batch = MethodType(Trainer._get_num_items_in_batch, trainer)
    return trainer


def prepare_for_sft(config: Any) -> None:
    """SFTTrainer.__init__: experts' routers are asked for their logits, for the load-balancing loss."""
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = hasattr(config, "output_router_logits") and config.router_aux_loss_coef != 0.0


def prepare_model(model: Any) -> None:
    """`Accelerator.prepare_model` under bf16: autocast inside, outputs cast to fp32 outside."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    # TRL's fused head, and nothing else, replaces the instance's forward
    forward = model.forward.__func__ if "forward" in vars(model) else type(model).forward
    wrapped = torch.autocast("cpu", dtype=torch.bfloat16)(forward)
    model.forward = MethodType(convert_outputs_to_fp32(wrapped), model)


def train(
    trainer: Any,
    model: Any,
    trainable: Tensors,
    optimizer: torch.optim.Optimizer,
    make_batch: Callable[[], Batch],
    phases: Phases,
    num_steps: int,
    accumulation: int,
) -> None:
    """`Trainer._run_epoch`, under the names it has there for what it holds."""
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.accelerator.backward = phases.beginning("backward", trainer.accelerator.backward)
    grad_norm = None
    for step in range(num_steps):
        phases.begin("forward", step)
        if step == 0:
            tr_loss = torch.tensor(0.0, device=trainable[0].device)
        batch_samples = [make_batch() for _ in range(accumulation)]
        num_items_in_batch = trainer._get_num_items_in_batch(batch_samples, trainable[0].device)
        for i, inputs in enumerate(batch_samples):
            if i:
                phases.begin("forward", step)
            tr_loss_step = trainer.training_step(model, inputs, num_items_in_batch)
            _ = torch.isnan(tr_loss_step) or torch.isinf(tr_loss_step)
            del _
            tr_loss += tr_loss_step
        grad_norm = None
        phases.begin("clip", step)
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0, foreach=True)
        phases.begin("optimizer", step)
        optimizer.step()
        phases.begin("zero_grad", step)
        model.zero_grad()
    phases.end()
    del grad_norm
