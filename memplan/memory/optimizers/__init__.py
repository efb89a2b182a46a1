"""Optimizers: what they keep for each parameter and what a step allocates for a moment.

One row each, by its Hugging Face `optim` string; `adamw_torch_forloop` and `sgd_momentum` are memplan's own names
for `AdamW(foreach=False)` and `SGD(momentum=…)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from memplan.architectures.builder import Weight
from memplan.errors import UnknownNameError
from memplan.memory.optimizers import bnb, torch_optim
from memplan.memory.optimizers.adafactor import adafactor
from memplan.memory.optimizers.clip import clip_tape
from memplan.memory.optimizers.plan import Group, Param, Plan
from memplan.ops.device import HOPPER, Device
from memplan.train_config import TrainConfig

__all__ = ["OPTIMIZERS", "Optimizer", "Param", "Plan", "optimizer_named", "plan_update"]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One row of the table: `steps` plays it over groups of parameters."""

    name: str
    steps: Callable[[Plan, Sequence[Group]], None]
    source: str
    bits: int = 32
    """Of a state's element, where the optimizer chooses that; torch's own follow the parameter's dtype."""


_ADAM, _BNB = "torch/optim/adam.py", "bitsandbytes/optim/optimizer.py"

OPTIMIZERS: dict[str, Optimizer] = {
    row.name: row
    for row in (
        Optimizer("adamw_torch", torch_optim.adamw_foreach, _ADAM),
        Optimizer("adamw_torch_fused", torch_optim.adamw_fused, _ADAM),
        Optimizer("adamw_torch_forloop", torch_optim.adamw_forloop, _ADAM),
        Optimizer("sgd", torch_optim.sgd, "torch/optim/sgd.py"),
        Optimizer("sgd_momentum", torch_optim.sgd_momentum, "torch/optim/sgd.py"),
        Optimizer("rmsprop", torch_optim.rmsprop, "torch/optim/rmsprop.py"),
        Optimizer("adagrad", torch_optim.adagrad, "torch/optim/adagrad.py"),
        Optimizer("adafactor", adafactor, "transformers/optimization.py"),
        Optimizer("adamw_bnb_8bit", bnb.two_states(bits=8), _BNB, 8),
        Optimizer("adamw_8bit", bnb.two_states(bits=8), _BNB, 8),
        Optimizer("paged_adamw_8bit", bnb.two_states(bits=8, paged=True), _BNB, 8),
        Optimizer("paged_adamw_32bit", bnb.two_states(bits=32, paged=True), _BNB),
        Optimizer("lion_8bit", bnb.one_state(bits=8), _BNB, 8),
        Optimizer("lion_32bit", bnb.one_state(bits=32), _BNB),
        Optimizer("paged_lion_8bit", bnb.one_state(bits=8, paged=True), _BNB, 8),
        Optimizer("paged_lion_32bit", bnb.one_state(bits=32, paged=True), _BNB),
        Optimizer("rmsprop_bnb", bnb.one_state(bits=32), _BNB),
        Optimizer("rmsprop_bnb_8bit", bnb.one_state(bits=8), _BNB, 8),
        Optimizer("rmsprop_bnb_32bit", bnb.one_state(bits=32), _BNB),
        Optimizer("ademamix", bnb.ademamix(bits=32), "bitsandbytes/optim/ademamix.py"),
        Optimizer("ademamix_8bit", bnb.ademamix(bits=8), "bitsandbytes/optim/ademamix.py", 8),
        Optimizer("paged_ademamix_32bit", bnb.ademamix(bits=32, paged=True), "bitsandbytes/optim/ademamix.py"),
        Optimizer("paged_ademamix_8bit", bnb.ademamix(bits=8, paged=True), "bitsandbytes/optim/ademamix.py", 8),
    )
}


def optimizer_named(name: str) -> Optimizer:
    """The row called `name`.

    Raises:
        UnknownNameError: there is none.
    """
    row = OPTIMIZERS.get(name)
    if row is None:
        raise UnknownNameError("optimizer", name, OPTIMIZERS)
    return row


def plan_update(weights: Iterable[Weight], config: TrainConfig, device: Device = HOPPER) -> Plan:
    """Clipping and the optimizer's step over the trained ones of `weights`, which come in the model's order.

    Raises:
        UnknownNameError: an optimizer that no row is called after.
    """
    row = optimizer_named(config.optimizer)
    trained = [w for w in weights if w.learns]
    params = [_param(w, config) for w in trained]
    plan = Plan(device)
    # transformers 5.17 trainer.py `_get_grad_norm`: without clipping the norm is taken all the same
    if params and (config.max_grad_norm or config.stack != "torch"):
        plan.clip = clip_tape(params)
    row.steps(plan, _groups(trained, params, config))
    return plan


# transformers 5.17 trainer.py `get_decay_parameter_names`
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _groups(trained: Sequence[Weight], params: Group, config: TrainConfig) -> list[Group]:
    """A plain loop has one group; Trainer makes two, with and without weight decay (`create_optimizer`)."""
    if config.stack == "torch":
        return [params]
    plain = [bool(_NO_DECAY.search(w.name.lower())) or w.of == "LayerNorm" for w in trained]
    return [[p for p, is_plain in zip(params, plain, strict=True) if is_plain is kept] for kept in (False, True)]


def _param(w: Weight, config: TrainConfig) -> Param:
    in_fp32 = w.of == "Embedding" and config.stack != "torch"
    return Param(w.numel, w.shape, w.dtype, in_fp32)
