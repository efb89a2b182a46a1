"""The work of one optimizer step, counted from the played program.

Every tensor that the program allocates is written once by some kernel, so its allocations are the kernels of a step
and their sizes the bytes written; what matrix products, attention and dequantisation write is theirs and is taken
out. In-place kernels allocate nothing: those of the optimizer, of gradient accumulation and of a loss that works in
tiles are counted beside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from memplan.memory.program import Play, Program
from memplan.model_spec import ModelSpec
from memplan.ops.quantized import dequantises
from memplan.ops.tensor import Tape
from memplan.timing.flops import PIECES, AttentionWork, Matmul, attentions, matmuls
from memplan.timing.layers import Linear, linears
from memplan.timing.update import clip_bytes, update_bytes
from memplan.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Count:
    """Kernels and the bytes that they write."""

    kernels: int = 0
    written_bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.kernels + other.kernels, self.written_bytes + other.written_bytes)

    def times(self, number: int) -> Count:
        return Count(self.kernels * number, self.written_bytes * number)


@dataclass(frozen=True, slots=True)
class Dequantisation:
    """4-bit weights made half precision again: `calls` times, `read_bytes` into `written_bytes`."""

    calls: int
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class StepWork:
    """One optimizer step: `num_micro_steps` forward and backward passes, then clipping and the update."""

    num_micro_steps: int
    tokens: int
    """Of one micro-step."""
    matmuls: tuple[Matmul, ...]
    """Of one micro-step, as are the next four."""
    attentions: tuple[AttentionWork, ...]
    dequantisation: Dequantisation
    forward: Count
    """Of embedding and layers."""
    loss: Count
    loss_backward: Count
    backward: Count
    """Of layers and embedding, recomputation included."""
    recomputed: Count
    """The part of `backward` that runs forward again."""
    num_adapters: int
    """Adapted linear layers."""
    num_checkpoints: int
    num_trained: int
    """Trained tensors."""
    tile_bytes: tuple[int, int]
    """Read and written in place by the loss, forward and backward."""
    update: Count
    clip_bytes: int
    """Read and written by clipping."""
    update_bytes: int
    """Read and written by the optimizer."""
    accumulation_bytes: int
    """Read and written by adding one micro-step's gradients to the last one's."""

    @property
    def model_flops(self) -> int:
        """Of one step, as MFU counts them: what the method needs, without recomputation."""
        once = sum(m.flops for m in self.matmuls if m.phase != "recompute")
        once += sum(a.flops for a in self.attentions if a.phase != "recompute")
        return once * self.num_micro_steps

    @property
    def hardware_flops(self) -> int:
        """Of one step, recomputation included."""
        once = sum(m.flops for m in self.matmuls) + sum(a.flops for a in self.attentions)
        return once * self.num_micro_steps


def step_work(
    program: Program,
    spec: ModelSpec,
    config: TrainConfig,
    *,
    num_micro_steps: int | None = None,
    layers: list[Linear] | None = None,
) -> StepWork:
    """The work of a step in the steady state.

    `num_micro_steps` may exceed what the program plays (two are enough: all after the first are alike). `layers` are
    those of `linears`, where they are known: they do not depend on batch, length or checkpointing.
    """
    layers = linears(program.weights, spec, config) if layers is None else layers
    products = tuple(matmuls(layers, spec, config))
    quantised = _dequantisation(layers, config)
    micro, update = _counts(program)
    own = _own_bytes(products, quantised, config)
    counts = {
        piece: replace(count, written_bytes=max(0, count.written_bytes - own[piece]))
        for piece, count in micro[-1].items()
    }
    trained = [w for w in program.weights if w.learns]
    recomputed = Count()
    if config.gradient_checkpointing:
        recomputed = Count(counts["forward"].kernels, 0)
    return StepWork(
        num_micro_steps=num_micro_steps or config.gradient_accumulation_steps,
        tokens=config.tokens_per_micro_batch,
        matmuls=products,
        attentions=tuple(attentions(spec, config, program.attentions)),
        dequantisation=quantised,
        **counts,
        recomputed=recomputed,
        num_adapters=(
            sum(layer.count for layer in layers if layer.part == "adapter") // 2
            + sum(layer.count for layer in layers if layer.part == "delta")
        ),
        num_checkpoints=spec.num_hidden_layers if config.gradient_checkpointing else 0,
        num_trained=len(trained),
        tile_bytes=_tile_bytes(spec, config),
        update=update,
        clip_bytes=clip_bytes(trained, config),
        update_bytes=update_bytes(trained, config),
        accumulation_bytes=3 * sum(w.numel * w.dtype.itemsize for w in trained),
    )


def _dequantisation(layers: list[Linear], config: TrainConfig) -> Dequantisation:
    rows, calls, read, written = config.tokens_per_micro_batch, 0, 0, 0
    for layer in layers:
        if not layer.stored_bytes:
            continue
        passes = 1  # backward always goes through a copy
        if dequantises(rows, layer.out_features, layer.in_features):
            passes += 2 if config.gradient_checkpointing else 1
        calls += layer.count * passes
        read += layer.stored_bytes * layer.count * passes
        written += 2 * layer.numel * layer.count * passes
    return Dequantisation(calls, read, written)


def _own_bytes(products: tuple[Matmul, ...], quantised: Dequantisation, config: TrainConfig) -> dict[str, int]:
    """Bytes that matrix products and dequantisation write into tensors of their own, by piece."""
    seen = [m for m in products if m.part != "head" or config.loss == "full"]  # else logits are tiles of one buffer
    own = {piece: sum(m.out_bytes for m in seen if m.piece == piece) for piece in PIECES}
    passes = 3 if config.gradient_checkpointing else 2
    own["forward"] += quantised.written_bytes // passes
    own["backward"] += quantised.written_bytes * (passes - 1) // passes
    return own


def _tile_bytes(spec: ModelSpec, config: TrainConfig) -> tuple[int, int]:
    """A fused loss reads each logit once for its statistics, and reads it again to write its gradient over it: in
    backward in TRL 1.16 kernels/chunked_logprob.py, at once in liger_kernel 0.8.5 ops/cross_entropy.py."""
    if config.loss == "full":
        return 0, 0
    itemsize = 2 if config.autocast or config.weight_dtype != "fp32" else 4
    logits = config.tokens_per_micro_batch * spec.vocab_size * itemsize
    return (logits, 2 * logits) if config.loss == "chunked" else (3 * logits, 0)


def _counts(program: Program) -> tuple[list[dict[str, Count]], Count]:
    """The pieces of each micro-step of the last step, and the update."""
    last = program.plays[-1].step
    micro: list[dict[str, Count]] = []
    update = Count()
    sums: dict[int, Count] = {}
    before, head = "", -1
    for play in _plays_of(program, last):
        count = sums.get(id(play.tape))
        if count is None:
            count = sums[id(play.tape)] = _count(play.tape)
        if play.phase == "forward" and before != "forward":
            micro.append(dict.fromkeys(PIECES, Count()))
        if play.phase == "loss" and before != "loss":
            head = play.frame
        before = play.phase
        if play.phase in ("forward", "loss", "backward"):
            piece = "loss_backward" if play.phase == "backward" and play.frame == head else play.phase
            micro[-1][piece] += count
        else:
            update += count
    return micro, update


def _plays_of(program: Program, step: int) -> Iterator[Play]:
    return (play for play in program.plays if play.step == step)


def _count(tape: Tape) -> Count:
    sizes = [size for _, size in tape if size]
    return Count(len(sizes), sum(sizes))
