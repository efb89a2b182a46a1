"""What loading leaves behind: the weights, in the order in which they are made.

A plain weight is allocated and stays. A quantised one is made in the model's dtype, quantised on the device and
dropped: its temporaries leave free blocks behind that later tensors reuse, whole where the rest would be too small
to split off, so that the order matters for what the allocator counts as allocated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from memplan.architectures.builder import Weight
from memplan.dtypes import DType
from memplan.ops.quantized import BLOCK_SIZE, NESTED_BLOCK_SIZE
from memplan.ops.tensor import Tape, round_block
from memplan.train_config import TrainConfig


@dataclass
class Loading:
    """Three tapes over one frame: the base model, what k-bit preparation casts, the adapters."""

    base: Tape = field(default_factory=list)
    casts: Tape = field(default_factory=list)
    adapters: Tape = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    empties_cache: bool = False
    """prepare_model_for_kbit_training ends with torch.cuda.empty_cache() (PEFT 0.21.2 utils/other.py)."""

    def events(self) -> Iterator[tuple[int, int]]:
        return chain(self.base, self.casts, self.adapters)

    def allocate(self, tape: Tape, num_bytes: int, kind: str) -> int:
        self.kinds.append(kind)
        slot = len(self.kinds) - 1
        tape.append((slot, round_block(num_bytes)))
        return slot


def load(weights: list[Weight], config: TrainConfig) -> Loading:
    """The base model comes first, then what prepare_model_for_kbit_training casts, then the adapters."""
    loading = Loading(empties_cache=config.method == "qlora" and config.kbit_prep)
    casts: list[tuple[int, Weight]] = []
    for w in weights:
        if w.kind == "adapters":
            continue
        if w.stored:
            _quantise(loading, w, config)
            continue
        loaded = w.loaded_dtype or w.dtype
        slot = loading.allocate(loading.base, w.numel * loaded.itemsize, w.kind)
        if loaded is not w.dtype:
            casts.append((slot, w))
    for slot, w in casts:
        loading.allocate(loading.casts, w.numel * w.dtype.itemsize, w.kind)
        loading.casts.append((slot, 0))
    _adapters(loading, [w for w in weights if w.kind == "adapters"], config)
    return loading


def _adapters(loading: Loading, weights: list[Weight], config: TrainConfig) -> None:
    """PEFT 0.21.2 tuners/tuners_utils.py: each adapter is made in the dtype of the base weight that it stands beside
    (`_move_adapter_to_device_of_base_layer`; a 4-bit weight counts as its compute dtype), then all are cast to fp32 one
    by one (`cast_adapter_dtype`), then to the dtype that was asked for, if it is another (TRL 1.16 trainer/sft_trainer.py).
    """
    made = DType[config.weight_dtype]
    if made is DType.fp32 and config.method == "qlora":
        made = DType.bf16
    dtypes = [made]
    for dtype in (DType.fp32, DType[config.adapter_dtype]):
        if dtype is not dtypes[-1]:
            dtypes.append(dtype)
    slots: list[int] = []
    for step, dtype in enumerate(dtypes):
        for index, w in enumerate(weights):
            slot = loading.allocate(loading.adapters, w.numel * dtype.itemsize, w.kind)
            if step:
                loading.adapters.append((slots[index], 0))
                slots[index] = slot
            else:
                slots.append(slot)


def _quantise(loading: Loading, w: Weight, config: TrainConfig) -> None:
    """bitsandbytes 0.50.2 functional.py `quantize_4bit`, on a weight made on the device."""
    blocks = -(-w.numel // BLOCK_SIZE)
    tape = loading.base
    plain = loading.allocate(tape, w.numel * w.dtype.itemsize, "temporaries")
    absmax = loading.allocate(tape, blocks * 4, "temporaries" if config.double_quant else w.kind)
    loading.allocate(tape, (w.numel + 1) // 2, w.kind)
    loading.allocate(tape, 16 * 4, w.kind)
    if config.double_quant:
        loading.allocate(tape, 4, w.kind)
        centred = loading.allocate(tape, blocks * 4, "temporaries")
        loading.allocate(tape, 256 * 4, w.kind)
        loading.allocate(tape, -(-blocks // NESTED_BLOCK_SIZE) * 4, w.kind)
        loading.allocate(tape, blocks, w.kind)
        tape += [(centred, 0), (absmax, 0)]
    tape.append((plain, 0))
