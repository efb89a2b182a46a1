"""What loading leaves behind: the weights, in the order in which they are made.

A plain weight is allocated and stays. A quantised one is made in the model's dtype, quantised on the device and
dropped: its temporaries leave free blocks behind that later tensors reuse, whole where the rest would be too small
to split off, so that the order matters for what the allocator counts as allocated.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from memplan.architectures.builder import Weight
from memplan.dtypes import DType
from memplan.memory.loading_adapters import make_adapters
from memplan.memory.loading_tapes import Loading
from memplan.ops.quantized import BLOCK_SIZE, NESTED_BLOCK_SIZE
from memplan.train_config import TrainConfig

QMAP_BYTES = 256 * 4


def load(weights: Sequence[Weight], config: TrainConfig, *, workspace_bytes: int = 0) -> Loading:
    """The base model, parameters before buffers; what prepare_model_for_kbit_training casts, one by one; the adapters.

    `workspace_bytes` is what cuBLAS takes at its first product, which with DoRA is one of these.
    """
    loading = Loading(empties_cache=config.method == "qlora" and config.kbit_prep)
    base = [w for w in weights if w.kind != "adapters"]
    casts: list[Weight] = []
    slots: dict[int, int] = {}
    quantised: dict[Hashable, Loading] = {}
    makes_map = config.double_quant
    for w in sorted(base, key=lambda w: w.buffer):
        if w.stored:
            like = w.shape, w.dtype, w.kind, makes_map
            if like not in quantised:
                quantised[like] = _quantise(w, config, makes_map=makes_map)
            loading.append(quantised[like].base, quantised[like].kinds)
            makes_map = False
            if loading.num_before_kernels is None:
                loading.num_before_kernels = len(loading.base)
            continue
        loaded = w.loaded_dtype or w.dtype
        slots[id(w)] = loading.allocate(loading.base, w.numel * loaded.itemsize, w.kind)
        if loaded is not (w.prepared_dtype or w.dtype):
            casts.append(w)
    for w in casts:
        slot = slots[id(w)]
        slots[id(w)] = loading.allocate(loading.casts, w.numel * (w.prepared_dtype or w.dtype).itemsize, w.kind)
        loading.free(loading.casts, slot)
    for w in base:
        if w.prepared_dtype not in (None, w.dtype):
            loading.allocate(loading.settles, w.numel * w.dtype.itemsize, w.kind)
            loading.free(loading.settles, slots[id(w)])
    make_adapters(loading, weights, config, workspace_bytes)
    return loading


def _quantise(w: Weight, config: TrainConfig, *, makes_map: bool) -> Loading:
    """A weight made on the device and quantised there."""
    loading = Loading()
    plain = loading.allocate(loading.base, w.numel * w.dtype.itemsize)
    if config.quant_type == "int8":
        _quantise_int8(loading, w)
    else:
        _quantise_4bit(loading, w, config, makes_map=makes_map)
    loading.free(loading.base, plain)
    return loading


def _quantise_int8(loading: Loading, w: Weight) -> None:
    """bitsandbytes 0.50.2 nn/modules.py `Int8Params._quantize`: a copy in fp16, a scale a row, the codes."""
    tape = loading.base
    half = loading.allocate(tape, w.numel * DType.fp16.itemsize)
    loading.allocate(tape, w.shape[0] * 4, w.kind)
    loading.allocate(tape, w.numel, w.kind)
    loading.free(tape, half)


def _quantise_4bit(loading: Loading, w: Weight, config: TrainConfig, *, makes_map: bool) -> None:
    """bitsandbytes 0.50.2 functional.py `quantize_4bit`; the first nested one makes the global `name2qmap`."""
    blocks = -(-w.numel // BLOCK_SIZE)
    tape = loading.base
    absmax = loading.allocate(tape, blocks * 4, "temporaries" if config.double_quant else w.kind)
    loading.allocate(tape, (w.numel + 1) // 2, w.kind)
    loading.allocate(tape, 16 * 4, w.kind)
    # get_4bit_type: data.div_(data.abs().max())
    loading.free(tape, loading.allocate(tape, 16 * 4), loading.allocate(tape, 4))
    if not config.double_quant:
        return
    loading.allocate(tape, 4, w.kind)
    centred = loading.allocate(tape, blocks * 4)
    if makes_map:
        loading.allocate(tape, QMAP_BYTES, w.kind)
    loading.allocate(tape, -(-blocks // NESTED_BLOCK_SIZE) * 4, w.kind)
    loading.allocate(tape, blocks, w.kind)
    loading.allocate(tape, QMAP_BYTES, w.kind)
    loading.free(tape, centred, absmax)
