"""Bytes that clipping and the optimizer move: they work in place, so the played program does not tell.

One row each: how often a pass over the parameter, its gradient or a state reads or writes it. Sources: torch 2.11
torch/optim/adam.py, sgd.py, rmsprop.py, adagrad.py, torch/nn/utils/clip_grad.py; transformers 5.17 optimization.py;
bitsandbytes 0.50.2 csrc/kernels.cu (`kOptimizer32bit2State`, `kOptimizerStatic8bit2StateBlockwise`: one kernel).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memplan.architectures.builder import Weight
from memplan.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Passes:
    """Reads and writes per step of tensors of a parameter's size."""

    in_dtype: int
    """Passes in the parameter's own dtype: parameter, gradient, and states that follow its dtype."""
    state_bytes: float = 0.0
    """Bytes a parameter of states with a dtype of their own, read and written."""
    loops: bool = False
    """Python goes through the parameters one by one; otherwise a few kernels take them all."""
    blockwise: bool = False
    """One of bitsandbytes' kernels, which quantise their states block by block."""


_TWO_32, _TWO_8 = 2 * 2 * 4.0, 2 * 2 * (1 + 4 / 256)
_ONE_32, _ONE_8 = _TWO_32 / 2, _TWO_8 / 2
# bitsandbytes reads gradient and parameter, writes the parameter
_BNB = 3

PASSES: dict[str, Passes] = {
    # p.mul_, m.lerp_(g), v.mul_, v.addcmul_(g, g), sqrt(v), sqrt.div_, sqrt.add_, p.addcdiv_(m, sqrt)
    "adamw_torch": Passes(2 + 3 + 2 + 3 + 2 + 2 + 2 + 4),
    # one kernel: p, g, m, v read; p, m, v written
    "adamw_torch_fused": Passes(7),
    "adamw_torch_forloop": Passes(20, loops=True),
    # p.add_(g)
    "sgd": Passes(3),
    # buf.mul_, buf.add_(g), p.add_(buf)
    "sgd_momentum": Passes(8),
    # v.mul_, v.addcmul_(g, g), sqrt, add_, p.addcdiv_(g, avg)
    "rmsprop": Passes(2 + 3 + 2 + 2 + 4),
    # sum.addcmul_(g, g), sqrt, add_, g * -lr, p.addcdiv_
    "adagrad": Passes(3 + 2 + 2 + 2 + 4),
    # in fp32: g**2 (2), two means (2), outer product (1), update * g (3), rms (1), div_ (2), mul_ (2), decay (2),
    # p.add_ (3)
    "adafactor": Passes(0, state_bytes=18 * 4.0, loops=True),
    "adamw_bnb_8bit": Passes(_BNB, _TWO_8, loops=True, blockwise=True),
    "adamw_8bit": Passes(_BNB, _TWO_8, loops=True, blockwise=True),
    "paged_adamw_8bit": Passes(_BNB, _TWO_8, loops=True, blockwise=True),
    "paged_adamw_32bit": Passes(_BNB, _TWO_32, loops=True, blockwise=True),
    "lion_8bit": Passes(_BNB, _ONE_8, loops=True, blockwise=True),
    "lion_32bit": Passes(_BNB, _ONE_32, loops=True, blockwise=True),
    "paged_lion_8bit": Passes(_BNB, _ONE_8, loops=True, blockwise=True),
    "paged_lion_32bit": Passes(_BNB, _ONE_32, loops=True, blockwise=True),
    "rmsprop_bnb": Passes(_BNB, _ONE_32, loops=True, blockwise=True),
    "rmsprop_bnb_8bit": Passes(_BNB, _ONE_8, loops=True, blockwise=True),
    "rmsprop_bnb_32bit": Passes(_BNB, _ONE_32, loops=True, blockwise=True),
    # two states and a second momentum
    "ademamix": Passes(_BNB, _TWO_32 + _ONE_32, loops=True, blockwise=True),
    "ademamix_8bit": Passes(_BNB, _TWO_8 + _ONE_8, loops=True, blockwise=True),
    "paged_ademamix_32bit": Passes(_BNB, _TWO_32 + _ONE_32, loops=True, blockwise=True),
    "paged_ademamix_8bit": Passes(_BNB, _TWO_8 + _ONE_8, loops=True, blockwise=True),
}

_CLIP_PASSES = 3
"""clip_grad_norm_ reads the gradients for their norm, then reads and writes them (`_foreach_mul_`, always run)."""


def clip_bytes(trained: Iterable[Weight], config: TrainConfig) -> int:
    """Bytes read and written by clipping."""
    return _CLIP_PASSES * sum(w.numel * w.dtype.itemsize for w in trained) if config.max_grad_norm else 0


def update_bytes(trained: Iterable[Weight], config: TrainConfig) -> int:
    """Bytes read and written by the optimizer in one step."""
    passes = PASSES[config.optimizer]
    return int(sum(w.numel * (passes.in_dtype * w.dtype.itemsize + passes.state_bytes) for w in trained))
