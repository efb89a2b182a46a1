"""Where each number comes from: for every component its formula, this run's numbers, one sentence of why, a source.

Nothing is worked out again: parts are the blocks alive at the peak of the played step and the weights of the
program, and the terms of a part sum to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memplan.alive import LiveBlock, alive_at_peak
from memplan.explain_terms import Term, by_piece, by_size, copies, largest_piece, per_parameter
from memplan.memory.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from memplan.architectures.builder import Weight
    from memplan.estimate import Estimate


@dataclass(frozen=True, slots=True)
class Part:
    """One component at the peak. `terms` sum to `num_bytes`."""

    name: str
    num_bytes: int
    formula: str
    terms: tuple[Term, ...]
    why: str
    source: str
    detail: str = ""
    """More of the largest term."""

    def __post_init__(self) -> None:
        assert sum(term.num_bytes for term in self.terms) == self.num_bytes, self


def explain(estimate: Estimate) -> tuple[Part, ...]:
    """Every component alive at the allocated peak; the parts sum to `estimate.allocated_bytes`."""
    blocks: dict[str, list[LiveBlock]] = {}
    for block in alive_at_peak(estimate.program):
        blocks.setdefault(block.kind, []).append(block)
    parts = [_WRITERS[name](estimate, blocks[name]) for name in _WRITERS if name in blocks]
    assert len(parts) == len(blocks), sorted(blocks)
    rounding = estimate.allocated_bytes - sum(part.num_bytes for part in parts)
    if rounding:
        parts.append(
            Part(
                "allocator_rounding",
                rounding,
                "blocks handed out − bytes asked for",
                (Term("by playing the sequence on the allocator", rounding),),
                "The allocator hands out a large block whole when 1 MiB or less would be left of it.",
                "c10/cuda/CUDACachingAllocator.cpp `should_split`",
            )
        )
    return tuple(parts)


def _weights(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    config = estimate.config
    weights = [w for w in estimate.program.weights if w.kind == "weights"]
    terms = []
    stored = [w for w in weights if w.stored]
    if stored:
        num_bytes = sum(w.resident_bytes for w in stored)
        numel = sum(w.numel for w in stored)
        text = f"{numel:,} in {config.quant_type} × {num_bytes / numel:.4f} B"
        terms.append(Term(text, num_bytes))
    plain: dict[str, list[Weight]] = {}
    for w in weights:
        if not w.stored:
            plain.setdefault(w.dtype.name, []).append(w)
    for dtype, group in plain.items():
        text = f"{sum(w.numel for w in group):,} in {dtype} × {group[0].dtype.itemsize} B"
        terms.append(Term(text, sum(w.resident_bytes for w in group)))
    formula, why = "parameters × bytes of their dtype", f"Loaded in {config.weight_dtype} and there throughout."
    source = "shapes of the transformers model"
    if stored and config.quant_type != "int8":
        scales = "1 B a block of 64 + 4 B a 256 blocks" if config.double_quant else "4 B a block of 64"
        formula = f"4-bit: ½ B a weight + {scales}, and small tables; else parameters × bytes"
        why = "Linear layers are frozen in 4 bit; embeddings, norms and the output head are not quantised."
        source = "bitsandbytes functional.py `quantize_4bit`; QLoRA, arXiv 2305.14314, section 3"
    elif stored:
        formula = "int8: 1 B a weight + 4 B a row; else parameters × bytes"
        why = "Linear layers are frozen in int8; embeddings, norms and the output head are not quantised."
        source = "bitsandbytes functional.py `int8_vectorwise_quant`; LLM.int8(), arXiv 2208.07339"
    return _part("weights", blocks, formula, terms, why, source)


def _adapters(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    weights = {w.name: w for w in estimate.program.weights if w.kind == "adapters"}
    counted: dict[tuple[int, int, int, int], list[str]] = {}
    others = []
    for name, down in weights.items():
        up = weights.get(name.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in name and up is not None and len(down.shape) == len(up.shape) == 2:
            key = (down.shape[0], down.shape[1], up.shape[0], down.dtype.itemsize)
            counted.setdefault(key, []).append(name)
        elif ".lora_A." not in name and ".lora_B." not in name:
            others.append(down)
    terms = []
    for (rank, d_in, d_out, itemsize), names in counted.items():
        modules = sorted({name.partition(".lora_A.")[0].rpartition(".")[2] for name in names})
        pairs = [(weights[name], weights[name.replace(".lora_A.", ".lora_B.")]) for name in names]
        text = f"{len(names)} × {rank} × ({d_in} + {d_out}) × {itemsize} B: {', '.join(modules)}"
        terms.append(Term(text, sum(a.resident_bytes + b.resident_bytes for a, b in pairs)))
    if others:
        text = f"{sum(w.numel for w in others):,} parameters beside the two matrices"
        terms.append(Term(text, sum(w.resident_bytes for w in others)))
    return _part(
        "adapters",
        blocks,
        "matrices × rank × (in + out) × bytes",
        terms,
        f"Each adapted matrix gets two thin ones, kept in {estimate.config.adapter_dtype}.",
        "LoRA, arXiv 2106.09685, section 4.1; PEFT tuners/lora/layer.py",
    )


def _gradients(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    trained = [w for w in estimate.program.weights if w.learns]
    text = f"{len(blocks):,} blocks for {len(trained):,} trained tensors ({sum(w.numel for w in trained):,} parameters)"
    alive, full = sum(b.num_bytes for b in blocks), estimate.bytes_of("gradients")
    why = "Every trained parameter has a gradient of its own dtype from its backward to zero_grad."
    if alive < full:
        why = "Backward makes them layer by layer, so that not all of them are there at the peak."
    term = Term(text, alive)
    return _part("gradients", blocks, "trained parameters × bytes", [term], why, "torch.autograd AccumulateGrad")


def _optimizer_states(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    row = OPTIMIZERS[estimate.config.optimizer]
    return _part(
        "optimizer_states",
        blocks,
        f"what {row.name} keeps of each trained parameter",
        copies(estimate, blocks) or [per_parameter(estimate, blocks)],
        "Made by the first step and kept for good: the peak is that of a later step.",
        row.source,
    )


def _activations(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    if estimate.config.gradient_checkpointing:
        formula = "layers × tokens × hidden_size × bytes + one layer recomputed"
        why = "Checkpointing keeps what enters each layer; a layer's own are computed again in its backward."
        source = "torch/utils/checkpoint.py"
    else:
        formula = "layers × tokens × bytes a token that the layer's operations save"
        why = "Each operation saves for backward what its derivative needs; the formulas are those of autograd."
        source = "torch tools/autograd/derivatives.yaml"
    return _part(
        "activations", blocks, formula, by_piece(estimate, blocks), why, source, largest_piece(estimate, blocks)
    )


def _loss(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    how = {
        "full": ("tokens × vocab_size × bytes, several times", "The logits, their fp32 copy and their gradient."),
        "chunked": ("tile of tokens × vocabulary, a few times", "Logits are made, used and dropped tile by tile."),
        "liger": ("chunk of tokens × vocab_size, a few times", "Logits become gradients chunk by chunk, in place."),
    }
    formula, why = how[estimate.config.loss]
    source = {"full": "transformers loss/loss_utils.py", "chunked": "TRL trainer/utils.py `add_fused_lm_head`"}
    return _part(
        "loss", blocks, formula, by_size(estimate, blocks), why,
        source.get(estimate.config.loss, "Liger-Kernel ops/fused_linear_cross_entropy.py"),
    )  # fmt: skip


def _temporaries(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    return _part(
        "temporaries",
        blocks,
        "what operations hold while they run",
        by_size(estimate, blocks),
        "Gradients on their way down, dequantised weights, casts: gone a moment later.",
        "the step as played",
    )


def _workspaces(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    return _part(
        "workspaces",
        blocks,
        "one a thread that multiplies matrices",
        by_size(estimate, blocks, shaped=False),
        "cuBLAS keeps scratch memory for each handle, taken from the same allocator.",
        "aten/src/ATen/cuda/CublasHandlePool.cpp",
    )


def _inputs(estimate: Estimate, blocks: Sequence[LiveBlock]) -> Part:
    return _part(
        "inputs",
        blocks,
        "tensors × tokens × 8 B",
        by_size(estimate, blocks, shaped=False),
        "Token ids, labels and masks of the batch.",
        "the data collator's int64 tensors",
    )


_WRITERS: dict[str, Callable[[Estimate, Sequence[LiveBlock]], Part]] = {
    "weights": _weights,
    "adapters": _adapters,
    "gradients": _gradients,
    "optimizer_states": _optimizer_states,
    "activations": _activations,
    "loss": _loss,
    "temporaries": _temporaries,
    "workspaces": _workspaces,
    "inputs": _inputs,
}


def _part(
    name: str,
    blocks: Sequence[LiveBlock],
    formula: str,
    terms: Iterable[Term],
    why: str,
    source: str,
    detail: str = "",
) -> Part:
    """A part of these blocks; where the terms are of what the run has in all, the last one says what is not there."""
    total = sum(b.num_bytes for b in blocks)
    listed = list(terms)
    missing = total - sum(term.num_bytes for term in listed)
    if missing:
        listed.append(Term("not there at the peak" if missing < 0 else "in tensors beside these", missing))
    return Part(name, total, formula, tuple(listed), why, source, detail)
