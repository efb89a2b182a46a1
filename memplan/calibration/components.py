"""What a traced run held at its allocated peak, by memplan's components.

Told from the trace alone, never from a prediction; what a step allocates by when it dies:

- weights, adapters: made before the first step and there at the peak; in `load` weights, in `prepare` adapters, but
  for what `prepare_model_for_kbit_training` casts. int8's own tensors of a weight are made by its first forward.
- optimizer_states: made under torch/optim or bitsandbytes/optim, or in the optimizer's phase, and outliving it.
- inputs: made by the loop's batch, by what sends one to the device, or by what counts its labels.
- workspaces: made where cuBLAS is given its handle or workspace, and never freed.
- activations: made by a forward and alive when it is over: at the first event of backward, or, for what a checkpoint
  computes again, at the next allocation that is not part of that.
- gradients: made by backward and alive after it, or by a fused loss and freed with the gradients; those that autograd
  keeps for a leaf; those that die as a kept one of their size is made, the head's of a tied embedding.
- loss: the rest of what is made behind the model's last layers (no frame of a layer below), and in backward until the
  gradient of the logits is gone; numbers of at most 512 bytes that outlive backward.
- temporaries: everything else.

Cannot be told: what was allocated between the parts of a trace that holds the load and one step ("before the trace":
optimizer states, workspaces, a batch, and what the first step alone makes); a weight from a buffer; a tensor kept for
backward from one that only outlives the forward. Sizes are whole blocks of 512 bytes; what the allocator hands out
beyond them is in no trace, and is the measured peak less the sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from memplan.calibration.trace import Part
from memplan.calibration.trace_blocks import GAP, Block, History, Stretch
from memplan.ops.tensor import BLOCK_BYTES

UNTRACED = "before_the_trace"
MADE_UNTRACED = ("optimizer_states", "workspaces", "inputs")
"""What most of the blocks are that were allocated between the parts of a trace."""


@dataclass(frozen=True, slots=True)
class TracedPeak:
    """The highest point of the traced steps, in whole blocks of 512 bytes."""

    num_bytes: int
    step: int
    phase: str
    components: dict[str, int]
    """Sums to `num_bytes`."""


def traced_peak(parts: Sequence[Part]) -> TracedPeak:
    """Sums the live blocks at the allocated peak of a trace (`trace.read_trace`).

    Raises:
        MemplanError: the trace is not whole.
    """
    history = History.of(parts)
    num_bytes, at = history.peak
    told = _Rules(history)
    components: Counter[str] = Counter()
    for block in history.blocks:
        if block.born <= at < block.dies:
            components[told.component(block)] += block.num_bytes
    where = history.stretch_at(at)
    return TracedPeak(num_bytes, where.step, where.phase, dict(components))


class _Rules:
    """The rules of the module's docstring over one history."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.head: dict[int, tuple[float, float]] = {}
        """By first event of a forward: where its loss begins, and where its backward is done with the logits."""
        self.waiting = {block for s in history.stretches if s.phase == "backward" for block in _waiting(history, s)}
        self.recomputed = _recomputed(history)
        for stretch in history.stretches:
            if stretch.phase == "forward":
                self.head[stretch.begin] = self._head_of(stretch)

    def component(self, block: Block) -> str:
        stretch = block.stretch
        if stretch.phase == GAP:
            return UNTRACED
        if block.dies == inf and block.made_in("cuda.getCurrentCUDABlasHandle", "orkspace"):
            return "workspaces"
        if block.made_in(" make_batch", " send_to_device", "num_items_in_batch"):
            return "inputs"
        if stretch.step == 0:
            return self._before_steps(block)
        if stretch.phase == "forward":
            return self._in_forward(block)
        if stretch.phase == "backward":
            return self._in_backward(block)
        stays = stretch.phase == "optimizer" and block.dies >= stretch.end
        return "optimizer_states" if stays else "temporaries"

    def _before_steps(self, block: Block) -> str:
        if block.made_in("optim/"):
            return "optimizer_states"
        if block.stretch.phase != "prepare" or block.made_in("prepare_model_for_kbit_training"):
            return "weights"
        # Earlier traces named no frame of the harness, which makes the batch once the load's part is over.
        return "adapters" if block.is_from_python or self.history.has_gap else "inputs"

    def _in_forward(self, block: Block) -> str:
        begins, _ = self.head[block.stretch.begin]
        behind_model = block.born >= begins
        if block.dies < block.stretch.end:
            return "loss" if behind_model else "temporaries"
        if block.dies == inf and block.made_in("bitsandbytes/"):
            return "weights"
        backward = self.history.following(block.stretch, "backward")
        if behind_model and backward is not None:
            if block.num_bytes > BLOCK_BYTES and self._is_let_go_as_gradient(block, backward):
                return "gradients"
            last = max((other.born for other in self.history.made_during(backward)), default=0)
            if block.num_bytes <= BLOCK_BYTES and block.dies > last:
                return "loss"
        return "activations"

    def _is_let_go_as_gradient(self, block: Block, backward: Stretch) -> bool:
        return block.dies >= backward.end and (block.dies == inf or self.history.stretch_at(block.dies).phase == "zero")

    def _in_backward(self, block: Block) -> str:
        stretch = block.stretch
        if block.dies >= stretch.end:
            return "loss" if block.is_from_python and block.num_bytes <= BLOCK_BYTES else "gradients"
        if block in self.recomputed:
            return "activations" if block.dies > self.recomputed[block] else "temporaries"
        if block.made_in("AccumulateGrad") or block in self.waiting:
            return "gradients"
        forwards = [s for s in self.history.stretches if s.phase == "forward" and s.begin < stretch.begin]
        _, ends = self.head[forwards[-1].begin] if forwards else (inf, 0)
        return "loss" if block.born < ends else "temporaries"

    def _head_of(self, forward: Stretch) -> tuple[float, float]:
        made = self.history.made_during(forward)
        last = max((b.born for b in made if b.made_in("modeling_layers.py", "utils/checkpoint.py")), default=0)
        behind = [b for b in made if b.born > last and _is_behind_model(b)]
        backward = self.history.following(forward, "backward")
        if not behind or backward is None:
            return (behind[0].born if behind else inf), 0
        saved = [b for b in made if b.born >= behind[0].born and backward.begin <= b.dies < backward.end]
        ends = max((b.dies for b in saved if b.num_bytes > BLOCK_BYTES), default=0)
        if any(b.made_in("log_softmax") for b in saved):
            # The gradient of the logits is handed on, block by block, until the head's product has taken it.
            smallest = max(b.num_bytes for b in behind) / 2  # in bf16 what the largest is in fp32
            for block in self.history.made_during(backward):
                if block.born > ends:
                    break
                if block.num_bytes >= smallest and block.dies < backward.end and block not in self.waiting:
                    ends = max(ends, block.dies)
        return behind[0].born, ends


def _is_behind_model(block: Block) -> bool:
    """Made by the head or the loss: no module inside the model. Fused losses call the model without its head."""
    inside = sum("/modeling_" in frame for frame in block.frames)
    return inside <= (0 if block.made_in("_fused_forward", "lce_forward") else 1)


def _waiting(history: History, backward: Stretch) -> list[Block]:
    """Blocks that die as backward makes a gradient of their size, which they are added to."""
    made = history.made_during(backward)
    kept = {block.born: block.num_bytes for block in made if block.dies >= backward.end}

    def is_added(block: Block) -> bool:
        before = (int(block.dies) - n for n in (1, 2, 3))  # the other term may die first
        return any(kept.get(number) == block.num_bytes for number in before if number > block.born)

    return [block for block in made if block.dies < backward.end and is_added(block)]


def _recomputed(history: History) -> dict[Block, int]:
    """Blocks that a checkpoint's second forward made in backward, and the first allocation after that forward."""
    ends: dict[Block, int] = {}
    going: list[Block] = []
    for block in history.blocks:
        if block.stretch.phase == "backward" and any(frame.endswith(" forward") for frame in block.frames):
            going.append(block)
            continue
        ends.update(dict.fromkeys(going, block.born))
        going = []
    return ends
