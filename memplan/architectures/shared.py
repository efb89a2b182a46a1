"""What a model computes once a step for all its layers: positions, rotary tables, attention masks.

Sources, transformers 5.17: masking_utils.py (`create_causal_mask`, `create_sliding_window_causal_mask`, `sdpa_mask`,
`eager_mask`, `find_packed_sequence_indices`), models/llama/modeling_llama.py `LlamaRotaryEmbedding`.
B batch, S tokens, H width of a rotary table.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from typing import TYPE_CHECKING, Self

from memplan.dtypes import DType
from memplan.ops.tensor import BorrowedStorage, Machine, Shape, Tensor

if TYPE_CHECKING:
    from memplan.architectures.decoder import Decoder


@dataclass
class Shared:
    """The tensors that every layer is given. Those of sliding layers (or those that attend in chunks) are None where
    no layer does."""

    position_ids: Tensor | None = None
    mask: Tensor | None = None
    sliding_mask: Tensor | None = None
    cos: Tensor | None = None
    """Or the table of complex numbers, where the model rotates by those."""
    sin: Tensor | None = None
    sliding_cos: Tensor | None = None
    sliding_sin: Tensor | None = None
    alibi: Tensor | None = None

    @classmethod
    def made_by(cls, decoder: Decoder, machine: Machine, dtype: DType, *, position_ids: Tensor | None = None) -> Shared:
        """The shared tensors of a run whose hidden states are of `dtype`."""
        return decoder.make_shared(machine, dtype, position_ids)

    @classmethod
    def computed(cls, decoder: Decoder, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Self:
        """Positions, masks, rotary tables: the order of most models."""
        tokens = decoder.config.seq_len
        shared = cls()
        shared.position_ids = positions(machine, tokens) if position_ids is None else position_ids
        windows, always = decoder.attention_windows(), decoder.spec.masks_blocks
        if "full_attention" in windows:
            shared.mask = causal_mask(decoder, machine, dtype, window=windows["full_attention"], always=always)
        if "sliding_attention" in windows:
            shared.sliding_mask = causal_mask(
                decoder, machine, dtype, window=windows["sliding_attention"], always=always
            )
        if "chunked_attention" in windows:
            shared.sliding_mask = causal_mask(
                decoder, machine, dtype, window=windows["chunked_attention"], is_chunk=True
            )
        decoder.make_other_masks(machine)
        table_dtype = decoder.shared_dtype(dtype)
        kinds = decoder.rotary_kinds if decoder.sliding_layers_have_own_rotary else ["full_attention"]
        full, sliding = (decoder.rotary_dim_of(kind) for kind in ("full_attention", "sliding_attention"))
        if full is not None and "full_attention" in kinds:
            shared.cos, shared.sin = decoder.rotary_table(machine, full, table_dtype)
        if sliding is not None and "sliding_attention" in kinds:
            shared.sliding_cos, shared.sliding_sin = decoder.rotary_table(machine, sliding, table_dtype)
        return shared

    @classmethod
    def stand_ins(cls, decoder: Decoder, machine: Machine, dtype: DType) -> Shared:
        """The same for the recording of a layer: their bytes are on another tape."""

        def stand_in(tensor: Tensor) -> Tensor:
            storage = BorrowedStorage(machine, prod(tensor.shape) * tensor.dtype.itemsize)
            return Tensor(storage, tensor.shape, tensor.dtype)

        made = decoder.make_shared(Machine(), dtype)
        present = {f.name: getattr(made, f.name) for f in fields(made)}
        return cls(**{name: stand_in(tensor) for name, tensor in present.items() if tensor is not None})

    def sliding(self) -> Self:
        """What a layer with sliding attention is given."""
        own = self.sliding_cos is not None
        return replace(
            self,
            mask=self.sliding_mask,
            cos=self.sliding_cos if own else self.cos,
            sin=self.sliding_sin if own else self.sin,
            sliding_mask=None,
            sliding_cos=None,
            sliding_sin=None,
        )

    def full(self) -> Self:
        """What a layer with full attention is given."""
        return replace(self, sliding_mask=None, sliding_cos=None, sliding_sin=None)

    def tensors(self) -> list[Tensor]:
        return [t for t in (getattr(self, f.name) for f in fields(self)) if t is not None]


def positions(m: Machine, tokens: int) -> Tensor:
    """(torch.arange(tokens) + 0).unsqueeze(0): [1, S]"""
    return shifted_range(m, tokens).view(1, tokens)


def causal_mask(
    decoder: Decoder,
    m: Machine,
    dtype: DType,
    *,
    window: int | None,
    detects_packing: bool = True,
    given: bool = False,
    always: bool = False,
    is_chunk: bool = False,
) -> Tensor | None:
    """The mask of causal attention over `window` tokens (all of them if None), or within chunks of so many.

    sdpa: boolean [1 or B, 1, S, S], or None where `is_causal` says the same: no padding and a window longer than the
    sequence (`_ignore_causal_mask_sdpa`). eager: additive, [B, 1, S, S] in `dtype`, always there. `given` says that the
    model makes an attention_mask of ones where it gets none, `always` that it wants a mask whatever it holds.
    """
    (batch, tokens), padding = decoder.batch, decoder.config.padding
    eager = decoder.attention_implementation == "eager"
    given = given or decoder.gets_mask
    if given:
        padding_mask = m.empty((batch, tokens), DType.bool8)
    elif detects_packing:
        _find_packed_sequences(m, batch, tokens)
    left_padding = _left_padding(m, batch, tokens, given=given) if is_chunk else None
    if not eager and not always and (window is None or window > tokens):
        if given:
            _all_true(m, batch, tokens)
        if not padding:
            return None
    ranges = [m.empty((count,), DType.int64) for count in (batch, 1)]
    ranges += [shifted_range(m, tokens), shifted_range(m, tokens)]
    square = (1, 1, tokens, tokens)
    mask = _positions_mask(m, square, window) if left_padding is None else _chunks_mask(m, batch, tokens)
    if given:  # and_masks: each condition is a tensor of its own, and each conjunction another one
        both = m.empty(mask.shape, DType.bool8)
        mask = both
        del both
        rows = m.empty((batch, 1, 1, tokens), DType.bool8)
        joined = m.empty((batch, 1, tokens, tokens), DType.bool8)
        del rows
        mask = joined
        del joined, padding_mask
    ranges.clear()
    # `expand` gives an unpadded mask the batch dimension without a copy
    if not eager:
        return mask.view(batch, 1, tokens, tokens)
    return m.empty((batch, 1, tokens, tokens), decoder.dtype_of_token_embeddings(dtype))


def _all_true(m: Machine, batch: int, tokens: int) -> None:
    """`fast_all`: mask.sum() == mask.numel()"""
    total = m.empty((), DType.int64)
    m.empty((batch, tokens), DType.int64)  # a sum of booleans runs on an int64 copy
    equal = m.empty((), DType.bool8)
    del total, equal


def _positions_mask(m: Machine, square: Shape, window: int | None) -> Tensor:
    """The part of the mask that positions decide: causal, or causal and within the window."""
    if window is None:
        return m.empty(square, DType.bool8)
    start = m.empty((*square[:3], 1), DType.int64)
    inside = m.empty(square, DType.bool8)
    del start
    mask = m.empty(square, DType.bool8)
    del inside
    causal = m.empty(square, DType.bool8)
    both = m.empty(square, DType.bool8)
    del causal, mask
    return both


def _left_padding(m: Machine, batch: int, tokens: int, *, given: bool) -> Tensor:
    """`create_chunked_causal_mask`: the first chunk begins behind the padding on the left of each row."""
    if not given:
        return m.empty((batch,), DType.int64)
    seen = m.empty((batch, tokens), DType.int64)
    zeros = m.empty((batch, tokens), DType.bool8)
    is_zero = m.empty((batch, tokens), DType.bool8)
    del seen, zeros
    counted = m.empty((batch,), DType.int64)
    del is_zero
    return counted


def _chunks_mask(m: Machine, batch: int, tokens: int) -> Tensor:
    """`chunked_causal_mask_function`, by row since each has its own padding: [B, 1, S, S]."""
    keys = _chunk_of_each(m, (batch, 1, 1, tokens))
    queries = _chunk_of_each(m, (batch, 1, tokens, 1))
    shape = (batch, 1, tokens, tokens)
    same = m.empty(shape, DType.bool8)
    del keys, queries
    mask = m.empty(shape, DType.bool8)
    del same
    causal = m.empty((1, 1, tokens, tokens), DType.bool8)
    both = m.empty(shape, DType.bool8)
    del causal, mask
    return both


def _chunk_of_each(m: Machine, shape: Shape) -> Tensor:
    """(index - left_padding[row]) // chunk_size"""
    padding = m.empty((shape[0], 1, 1, 1), DType.int64)
    shifted = m.empty(shape, DType.int64)
    del padding
    chunk = m.empty(shape, DType.int64)
    del shifted
    return chunk


def shifted_range(m: Machine, tokens: int) -> Tensor:
    """torch.arange(tokens) + 0"""
    counted = m.empty((tokens,), DType.int64)
    shifted = m.empty((tokens,), DType.int64)
    del counted
    return shifted


def _find_packed_sequences(m: Machine, batch: int, tokens: int) -> None:
    """`find_packed_sequence_indices`: only temporaries, when each row is one sequence."""
    first = m.empty((batch, 1), DType.int64)
    prepended = m.empty((batch, tokens + 1), DType.int64)
    difference = m.empty((batch, tokens), DType.int64)
    del prepended
    breaks = m.empty((batch, tokens), DType.bool8)
    sequence = m.empty((batch, tokens), DType.int64)
    cast = m.empty((batch, tokens), DType.int64)  # cumsum of booleans runs on an int64 copy
    del cast, breaks
    is_zero = m.empty((batch,), DType.bool8)
    is_one = m.empty((), DType.bool8)
    del is_zero, is_one, first, difference, sequence


def rotary_table(m: Machine, tokens: int, width: int, dtype: DType) -> tuple[Tensor, Tensor]:
    """cos and sin [1, 1, S, H] in `dtype`, computed in fp32."""
    shape = (1, 1, tokens, width)
    positions = m.empty((1, 1, tokens), DType.fp32)
    frequencies = m.empty((1, width // 2, tokens), DType.fp32)
    m.calls("cublas")
    doubled = m.empty(shape, DType.fp32)
    cosine = m.empty(shape, DType.fp32)
    cos = m.empty(shape, DType.fp32)
    del cosine
    sine = m.empty(shape, DType.fp32)
    sin = m.empty(shape, DType.fp32)
    del sine
    if dtype is not DType.fp32:
        cast = m.empty(shape, dtype), m.empty(shape, dtype)
        del positions, frequencies, doubled
        cos, sin = cast
    return cos, sin
