"""What a run holds from its start: weights and adapters as loading leaves them, and the optimizer's states.

None of it depends on the batch or on checkpointing. A search over batch sizes and sequence lengths asks for the same
again and again, so that the last few are kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from memplan.architectures.builder import Weight
from memplan.memory.loading import load
from memplan.memory.loading_tapes import Loading
from memplan.memory.optimizers import Plan, plan_update
from memplan.memory.segment import Segment
from memplan.ops.device import Device
from memplan.train_config import TrainConfig

_NUM_KEPT = 8
_SAID_OF_THE_STEP = (
    "micro_batch_size", "seq_len", "gradient_accumulation_steps", "gradient_checkpointing", "reentrant",
)  # fmt: skip
_FIELDS = tuple(name for name in TrainConfig.model_fields if name not in _SAID_OF_THE_STEP)
assert Weight._fields[0] == "name"


@dataclass(frozen=True, slots=True)
class Resident:
    """Shared by programs: nobody changes its lists."""

    weights: list[Weight]
    loading: Loading
    loading_sizes: dict[int, int]
    """Bytes of each slot of `loading`."""
    plan: Plan
    plan_sizes: dict[int, int]


_made: dict[Hashable, Resident] = {}


def resident(
    embedding: Segment,
    layers: Sequence[Segment],
    head: Segment,
    config: TrainConfig,
    device: Device,
    *,
    layer_prefix: str,
    late: tuple[str, ...] = (),
    workspace_bytes: int,
) -> Resident:
    """What the model of these pieces holds; layers of one kind are one object.

    `late`: beginnings of the names of weights that the model registers behind its final norm, the embedding's first.

    Raises:
        UnknownNameError: an optimizer that no row is called after.
    """
    kinds = {id(layer): layer for layer in layers}
    number_of = {kind: number for number, kind in enumerate(kinds)}
    of_kinds = tuple(tuple(layer.weights) for layer in kinds.values())
    order = tuple(number_of[id(layer)] for layer in layers)
    said = tuple(getattr(config, name) for name in _FIELDS)
    made_of = tuple(embedding.weights), of_kinds, order, tuple(head.weights)
    key = made_of, said, device, layer_prefix, late, workspace_bytes
    found = _made.get(key)
    if found is not None:
        return found
    weights = [w for w in embedding.weights if not w.name.startswith(late)]
    parts = [[(w.name, w[1:]) for w in kind] for kind in of_kinds]
    for index, number in enumerate(order):
        prefix = f"{layer_prefix}.{index}."
        weights += [Weight(prefix + name, *rest) for name, rest in parts[number]]
    weights += [w for w in head.weights if not w.name.startswith(("lm_head", *late))] if late else []
    weights += [w for w in (*embedding.weights, *head.weights) if w.name.startswith(late)]
    weights += [w for w in head.weights if not late or w.name.startswith("lm_head")]
    loading = load(weights, config, workspace_bytes=workspace_bytes)
    plan = plan_update(weights, config, device)
    found = Resident(
        weights,
        loading,
        {slot: size for slot, size in loading.events() if size},
        plan,
        {slot: size for slot, size in (*plan.made, *plan.first) if size},
    )
    while len(_made) >= _NUM_KEPT:
        del _made[next(iter(_made))]
    _made[key] = found
    return found


def forget() -> None:
    """Lets go of what is kept, so that the next call makes it anew."""
    _made.clear()
