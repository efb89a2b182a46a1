"""Who lets go last of the tensors that all layers share: positions, rotary tables, the mask, what pieces carry."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.memory.segment import Segment


def lives_of_shared(
    embedding: Segment, layers: Sequence[Segment], slots: Sequence[int], *, reentrant: bool, mask_by_position: bool
) -> list[str]:
    """What lets go last of each of `slots`: the model's forward, the layers' backward, or the embedding's (positions,
    where they are learned). Reentrant checkpoints save what they are given by position, and let go of it one by one;
    what they are given by name they hold until the graph goes."""
    held = {index for layer in _kinds(layers) for index, kept in enumerate(layer.keeps_shared) if kept}
    lives = []
    for index, slot in enumerate(slots):
        if embedding.keeps_shared[index] and not reentrant:
            lives.append("embedding")
        elif reentrant and mask_by_position and slot == embedding.mask_slot:
            lives.append("positional")
        elif index not in held:
            lives.append("forward")
        else:
            is_argument = index >= len(slots) - len(embedding.carried)
            lives.append("arguments" if reentrant and is_argument else "layers")
    return lives


def deaths_of_shared(
    layers: Sequence[Segment], slots: Sequence[int], lives: Sequence[str], *, reentrant: bool
) -> dict[int, list[tuple[int, int]]]:
    """By layer, the slots that it is the last to hold, each with the position on its backward tape where it goes; those
    that all checkpoints hold go with the first layer's."""
    deaths: dict[int, list[tuple[int, int]]] = {}
    for i, (slot, life) in enumerate(zip(slots, lives, strict=True)):
        if life != ("arguments" if reentrant else "layers"):
            continue
        if any(layer.stack_keeps[i] for layer in _kinds(layers)):
            deaths.setdefault(0, []).append((layers[0].checkpoint_dies, slot))
        else:
            last = next(index for index, layer in enumerate(layers) if layer.keeps_shared[i])
            deaths.setdefault(last, []).append((layers[last].shared_dies[i], slot))
    return deaths


def _kinds(layers: Sequence[Segment]) -> list[Segment]:
    return list({id(layer): layer for layer in layers}.values())
