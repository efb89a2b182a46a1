"""How many columns LLM.int8() keeps whole: those that hold an activation of 6 or more (arXiv 2208.07339, section 3.2).

That is data. Counted here is what fresh weights give, each normal with `initializer_range`, on tokens that do not
resemble each other: the harness trains such models, and of trained ones nothing is known beforehand. For T tokens, and
with Q(z) the probability that a normal variable is beyond z on either side, of n columns are expected to be kept

    n (1 - (1 - p)^T)       p that of one element

    behind a norm           p = Q(6): none
    hidden states as they   p = Q(6 / sigma), sigma^2 their variance: where norms come after attention and MLP,
    are (olmo2, olmo3,      each adds 1 to it
    gemma4's own inputs)
    into the MLP's second   p = P(|act(g)| >= 6), or of a gated one P(|act(g) u| >= 6), with g and u of deviation
    projection              s = initializer_range sqrt(hidden_size) sigma
    the same of gemma3n,    g - c in place of g, where that is above zero: c = s Phi^-1(share that is cut)
    where gates are cut
    into gemma4's           p = P(|act(g) u| >= 6), g of deviation s, sigma^2 the stream's, and u of the deviation of a
    per_layer_projection    layer's own embedding: half the sum of a norm's and of initializer_range^2 times its width
    into o_proj             row t of a sequence is the mean of t values: p_t = Q(6 sqrt(t) / s)

Neighbouring tokens do resemble each other (attention gives them nearly the same mean), so that this is rather too much:
the 16 measured runs take between 2.1 % less and 0.01 % more than predicted (allocated; h200-drawn, h200-before-freeze).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import takewhile

from memplan.model_spec import ModelSpec
from memplan.train_config import TrainConfig

THRESHOLD = 6.0
"""`llm_int8_threshold` of BitsAndBytesConfig, its default."""
_ATTENTION_OUT = ("o_proj", "out_proj", "attention.dense", "attn.c_proj")
_MLP_OUT = ("fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj", "ffn.down_proj")
_POINTS = 4000
_DEVIATIONS = 9.0


def outlier_columns(
    spec: ModelSpec, config: TrainConfig, name: str, in_features: int, variance: float, sparsity: float = 0.0
) -> int:
    """Columns of what the linear layer `name` reads that are expected to hold an outlier.

    Args:
        variance: of the hidden states that its block reads; 1 behind a norm.
        sparsity: share of the gates that is cut to zero before the activation.
    """
    tokens = config.tokens_per_micro_batch
    deviation = spec.initializer_range * math.sqrt(spec.hidden_size * variance)
    if name.endswith("linear_attn.out_proj"):  # normed, times silu of the gate
        p = _of_activation("silu", deviation, 1.0)
    elif name.endswith(_ATTENTION_OUT):
        by_row = (_beyond(THRESHOLD * math.sqrt(t) / deviation) for t in range(1, config.seq_len + 1))
        # ever less, and 0 to the machine after some dozens
        logs = (math.log1p(-min(p, _SURE)) for p in takewhile(bool, by_row))
        return round(in_features * -math.expm1(config.micro_batch_size * sum(logs)))
    elif name.endswith("per_layer_projection"):
        own = math.sqrt((1.0 + spec.initializer_range**2 * spec.hidden_size_per_layer_input) / 2.0)
        p = _of_activation(spec.hidden_act, deviation, own)
    elif name.endswith(_MLP_OUT):
        p = _of_activation(spec.hidden_act, deviation)
    elif name.endswith("down_proj"):
        p = _of_activation(spec.hidden_act, deviation, deviation, sparsity)
    else:
        p = _beyond(THRESHOLD / math.sqrt(variance)) if variance else 0.0
    return round(in_features * -math.expm1(tokens * math.log1p(-min(p, _SURE))))


_SURE = 1.0 - 1e-12


def _quantile(share: float) -> float:
    """Below which a standard normal variable is with the probability `share`: by bisection."""
    low, high = -_DEVIATIONS, _DEVIATIONS
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if 0.5 * math.erfc(-middle / math.sqrt(2.0)) < share else (low, middle)
    return low


def _beyond(z: float) -> float:
    """Probability that a standard normal variable is beyond z on either side."""
    return math.erfc(z / math.sqrt(2.0))


@cache
def _of_activation(name: str, deviation: float, factor: float | None = None, sparsity: float = 0.0) -> float:
    """P(|act(g)| >= 6), or P(|act(g) u| >= 6), for g normal of that deviation and u of the deviation `factor`; of g
    counts what it is above the quantile `sparsity`, if there is one."""
    cutoff = _quantile(sparsity) if sparsity > 0.0 else None
    act = _ACTIVATIONS.get(name, _gelu)
    step = 2.0 * _DEVIATIONS / _POINTS
    total = 0.0
    for number in range(_POINTS + 1):
        z = -_DEVIATIONS + number * step
        size = abs(act(deviation * (z if cutoff is None else max(0.0, z - cutoff))))
        reaches = float(size >= THRESHOLD)
        if factor is not None:
            reaches = _beyond(THRESHOLD / (size * factor)) if size else 0.0
        total += reaches * math.exp(-z * z / 2.0)
    return total * step / math.sqrt(2.0 * math.pi)


def _silu(x: float) -> float:
    return x / (1.0 + math.exp(-x)) if x > -700.0 else 0.0


def _gelu(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2.0))


def _relu(x: float) -> float:
    return max(x, 0.0)


_ACTIVATIONS: dict[str, Callable[[float], float]] = {"silu": _silu, "swish": _silu, "relu": _relu}
