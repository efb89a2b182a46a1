"""What get_peft_model makes (PEFT 0.21.2 peft_model.py, tuners/lora/layer.py), and the casts after it.

Each adapter is made in the dtype of the base weight that it stands beside (tuners/tuners_utils.py
`_move_adapter_to_device_of_base_layer`; a 4-bit weight counts as its compute dtype, an int8 one as none, so fp32);
then the `modules_to_save` are copied; then every adapter is cast to fp32, one by one (`cast_adapter_dtype`), and all
that trains to the dtype that was asked for, if it is another (TRL 1.16 trainer/sft_trainer.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from memplan.architectures.builder import MAGNITUDE, Weight
from memplan.dtypes import DType
from memplan.memory.loading_tapes import Loading
from memplan.ops.quantized import BLOCK_SIZE
from memplan.train_config import TrainConfig

SAVED = ".modules_to_save."


def make_adapters(loading: Loading, weights: Sequence[Weight], config: TrainConfig, workspace_bytes: int) -> None:
    """Fills `loading.adapters`."""
    base = {w.name: w for w in weights if w.kind != "adapters"}
    trained = [w for w in weights if w.kind == "adapters"]
    saved = [w for w in trained if SAVED in w.name]
    adapters = [(w.name.partition(".lora_")[0], w) for w in trained if SAVED not in w.name]
    tape = loading.adapters
    slots: dict[str, int] = {}
    dtypes: dict[str, DType] = {}
    # linear layers, then bare parameters
    for name, w in sorted(adapters, key=lambda adapter: adapter[0] in base):
        dtypes[w.name] = made = w.loaded_dtype or base[name].dtype
        held: list[int] = []
        if MAGNITUDE in w.name:
            held = _weight_norm(loading, base[f"{name}.weight"], made, config, workspace_bytes)
            workspace_bytes = 0
        slots[w.name] = loading.allocate(tape, w.numel * made.itemsize, w.kind)
        if held:
            loading.free(tape, *held)
    for w in saved:
        dtypes[w.name] = w.loaded_dtype or w.dtype
        slots[w.name] = loading.allocate(tape, w.numel * dtypes[w.name].itemsize, w.kind)
    casts = [(w, DType.fp32) for _, w in adapters] + [(w, w.dtype) for w in trained]
    for w, wanted in casts:
        if dtypes[w.name] is not wanted:
            fresh = loading.allocate(tape, w.numel * wanted.itemsize, w.kind)
            loading.free(tape, slots[w.name])
            slots[w.name], dtypes[w.name] = fresh, wanted


def _weight_norm(loading: Loading, base: Weight, made: DType, config: TrainConfig, workspace_bytes: int) -> list[int]:
    """tuners/lora/dora.py `DoraLinearLayer.update_layer`, up to the norm of weight + scaling * B @ A: what it holds."""
    tape = loading.adapters
    size = base.numel * made.itemsize
    held: list[int] = []
    if base.stored and config.quant_type != "int8":
        held += _copy_4bit(loading, base)
        if config.double_quant:
            absmax = loading.allocate(tape, -(-base.numel // BLOCK_SIZE) * 4)
            held.append(loading.allocate(tape, size))
            loading.free(tape, absmax)
        else:
            held.append(loading.allocate(tape, size))
    elif base.stored:
        product = loading.allocate(tape, base.numel * 4)  # int8_vectorwise_dequant: codes * scales * constant
        held.append(loading.allocate(tape, base.numel * 4))
        loading.free(tape, product)
    held.append(loading.allocate(tape, size))  # lora_B @ lora_A
    if workspace_bytes:
        loading.allocate(tape, workspace_bytes, "workspaces")
    scaled = loading.allocate(tape, size)
    held.append(loading.allocate(tape, size))
    loading.free(tape, scaled)
    return held


def _copy_4bit(loading: Loading, base: Weight) -> list[int]:
    """copy.deepcopy of a Linear4bit: its quantisation state twice, once for the weight and once for the module."""
    codes, *state = base.stored if len(base.stored) > 3 else (base.stored[1], base.stored[0], base.stored[2])
    tape = loading.adapters
    first = [loading.allocate(tape, n) for n in state]
    data = loading.allocate(tape, codes)
    return [*first, data, *[loading.allocate(tape, n) for n in state]]
