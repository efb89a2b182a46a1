"""The terms of an explanation: blocks in numbers that a reader can check against the model's shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from memplan.alive import LiveBlock
from memplan.ops.tensor import BLOCK_BYTES, round_block
from memplan.units import human

if TYPE_CHECKING:
    from memplan.estimate import Estimate

MAX_TERMS = 6
"""Of a part in blocks; what is smaller is summed up in one more."""


@dataclass(frozen=True, slots=True)
class Term:
    """One summand: what it is, in numbers, and its bytes."""

    text: str
    num_bytes: int


def copies(estimate: Estimate, blocks: Sequence[LiveBlock]) -> list[Term]:
    """States that are whole copies of the trained parameters in their dtype, as AdamW's two; none if they are not."""
    trained = [w for w in estimate.program.weights if w.learns]
    of_parameters = Counter(round_block(w.numel * w.dtype.itemsize) for w in trained)
    held = Counter(b.num_bytes for b in blocks)
    dtypes = {w.dtype for w in trained}
    number = min((held[size] // count for size, count in of_parameters.items()), default=0)
    if not number or len(dtypes) != 1:
        return []
    beside = held - Counter({size: number * count for size, count in of_parameters.items()})
    if set(beside) - {BLOCK_BYTES}:
        return []
    (dtype,) = dtypes
    text = f"{number} × {sum(w.numel for w in trained):,} × {dtype.itemsize} B"
    terms = [Term(text, number * sum(size * count for size, count in of_parameters.items()))]
    if beside:
        terms.append(
            Term(f"{beside[BLOCK_BYTES]:,} step counters × {BLOCK_BYTES} B", beside[BLOCK_BYTES] * BLOCK_BYTES)
        )
    return terms


def per_parameter(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Term:
    num_params = estimate.num_trainable_params
    num_bytes = sum(b.num_bytes for b in blocks)
    per_param = f"{num_bytes / num_params:.2f} B" if num_params else "nothing"
    return Term(f"{len(blocks):,} tensors for {num_params:,} parameters: {per_param} a parameter", num_bytes)


def by_size(estimate: Estimate, blocks: Sequence[LiveBlock], *, shaped: bool = True) -> list[Term]:
    """Blocks of one size in one term; `shaped` names a size after the model's widths where it is a product of them."""
    name = partial(_shape, estimate) if shaped else human
    counts = Counter(b.num_bytes for b in blocks).items()
    ordered = sorted(counts, key=lambda item: -item[0] * item[1])
    terms = [Term(f"{count:,} × {name(size)}", count * size) for size, count in ordered[:MAX_TERMS]]
    rest = ordered[MAX_TERMS:]
    if rest:
        terms.append(Term(f"{sum(c for _, c in rest):,} smaller", sum(s * c for s, c in rest)))
    return terms


def by_piece(estimate: Estimate, blocks: Sequence[LiveBlock]) -> list[Term]:
    """Equal layers in one term: how many, and what each holds a token."""
    held_by: dict[str, list[int]] = {}
    for b in blocks:
        held_by.setdefault(b.piece, []).append(b.num_bytes)
    equal: dict[tuple[int, ...], list[str]] = {}
    for piece, unsorted in held_by.items():
        equal.setdefault(tuple(sorted(unsorted)), []).append(piece)
    terms = []
    for sizes, names in equal.items():
        held = sum(sizes)
        who = names[0] if len(names) == 1 else f"{len(names)} layers"
        per_token = f"{held / estimate.config.tokens_per_micro_batch:,.0f} B a token"
        what = _shape(estimate, sizes[0]) if len(sizes) == 1 else f"{len(sizes)} tensors, {per_token}"
        terms.append(Term(f"{who} × {what}" if len(names) > 1 else f"{who}: {what}", held * len(names)))
    terms.sort(key=lambda term: -term.num_bytes)
    if len(terms) > MAX_TERMS:
        rest = terms[MAX_TERMS:]
        terms[MAX_TERMS:] = [Term(f"{len(rest)} smaller pieces", sum(term.num_bytes for term in rest))]
    return terms


def largest_piece(estimate: Estimate, blocks: Sequence[LiveBlock]) -> str:
    """What the piece that holds most has, size by size, in bytes a token."""
    held = Counter[str]()
    for b in blocks:
        held[b.piece] += b.num_bytes
    piece = held.most_common(1)[0][0]
    counts = Counter(b.num_bytes for b in blocks if b.piece == piece)
    tokens = estimate.config.tokens_per_micro_batch
    ordered = sorted(counts.items(), key=lambda item: -item[0] * item[1])
    listed = ", ".join(f"{count} × {size / tokens:,.6g}" for size, count in ordered[:MAX_TERMS])
    rest = sum(counts.values()) - sum(count for _, count in ordered[:MAX_TERMS])
    return f"{piece} in B a token: {listed}" + (f", {rest} smaller" if rest else "")


def _shape(estimate: Estimate, num_bytes: int) -> str:
    """`num_bytes` as tokens × width × bytes where exactly one such product fits, else as it is."""
    spec, tokens = estimate.model, estimate.config.tokens_per_micro_batch
    widths = {spec.hidden_size, spec.intermediate_size, spec.vocab_size}
    fits = {(w, i) for w in widths for i in (2, 4) if tokens * w * i == num_bytes}
    if len(fits) != 1:
        return human(num_bytes)
    width, itemsize = fits.pop()
    return f"{tokens:,} tokens × {width:,} × {itemsize} B"
