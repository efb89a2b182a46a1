"""What loading leaves behind: the weights, in the order in which they are made.

A plain weight is allocated and stays. A quantised one is made in the model's dtype, quantised on the device and
dropped: its temporaries leave free blocks behind that later tensors reuse, whole where the rest would be too small
to split off, so that the order matters for what the allocator counts as allocated.
"""

from __future__ import annotations

from memplan.architectures.builder import Weight
from memplan.ops.quantized import BLOCK_SIZE, NESTED_BLOCK_SIZE
from memplan.ops.tensor import Tape, round_block
from memplan.train_config import TrainConfig


def load_tape(weights: list[Weight], config: TrainConfig) -> tuple[Tape, list[str]]:
    """The tape of loading `weights` and the kind of each slot.

    The base model comes first, then what prepare_model_for_kbit_training casts, then the adapters, as PEFT adds
    them to a loaded model.
    """
    tape: Tape = []
    kinds: list[str] = []

    def allocate(num_bytes: int, kind: str) -> int:
        kinds.append(kind)
        tape.append((len(kinds) - 1, round_block(num_bytes)))
        return len(kinds) - 1

    def free(slot: int) -> None:
        tape.append((slot, 0))

    casts: list[tuple[int, Weight]] = []
    for w in weights:
        if w.kind == "adapters":
            continue
        if w.stored:
            _quantise(w, config, allocate, free)
            continue
        loaded = w.loaded_dtype or w.dtype
        slot = allocate(w.numel * loaded.itemsize, w.kind)
        if loaded is not w.dtype:
            casts.append((slot, w))
    for slot, w in casts:
        allocate(w.numel * w.dtype.itemsize, w.kind)
        free(slot)
    for w in weights:
        if w.kind == "adapters":
            allocate(w.numel * w.dtype.itemsize, w.kind)
    return tape, kinds


def _quantise(w: Weight, config: TrainConfig, allocate, free) -> None:  # type: ignore[no-untyped-def]
    """bitsandbytes 0.50.2 functional.py `quantize_4bit`, on a weight made on the device."""
    blocks = -(-w.numel // BLOCK_SIZE)
    plain = allocate(w.numel * w.dtype.itemsize, "temporaries")
    absmax = allocate(blocks * 4, "temporaries" if config.double_quant else w.kind)
    allocate((w.numel + 1) // 2, w.kind)
    allocate(16 * 4, w.kind)
    if config.double_quant:
        allocate(4, w.kind)
        centred = allocate(blocks * 4, "temporaries")
        allocate(256 * 4, w.kind)
        allocate(-(-blocks // NESTED_BLOCK_SIZE) * 4, w.kind)
        allocate(blocks, w.kind)
        free(centred)
        free(absmax)
    free(plain)
