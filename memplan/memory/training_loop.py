"""Tensors that the training loop itself holds: batches, counts, losses, norms.

torch: one batch for the whole run, nothing else (calibration/loop.py). trainer and trl, transformers 5.17 trainer.py:
the dataloader sends every micro-batch of a step to the device before the step (`get_batch_samples`, with the
count of labelled tokens), while `_run_epoch` still holds the last ones; `tr_loss_step` and `grad_norm` live until the
next step replaces them, `_tr_loss` throughout.
"""

from __future__ import annotations

from memplan.memory.program import Program
from memplan.ops.tensor import BLOCK_BYTES, Tape, round_block
from memplan.train_config import TrainConfig

Place = tuple[int, int]
"""(frame, slot)"""


class TrainingLoop:
    """Plays what the loop of `config.stack` allocates and frees around the pieces of a step."""

    def __init__(self, program: Program, config: TrainConfig) -> None:
        self.program = program
        self.config = config
        self.is_trainer = config.stack != "torch"
        self._batch: tuple[int, Tape] | None = None
        self._loss: Place | None = None
        self._norm: Place | None = None

    def begin_step(self, step: int) -> None:
        """The batches of the step; the loop of `torch` makes its one batch before the first."""
        if not self.is_trainer:
            if step == 0:
                self._play_new("forward", step, self._tensors(1), "inputs")
            return
        if step == 0:
            self._play_new("forward", step, [(0, BLOCK_BYTES)], "loss")  # _tr_loss
        tape = self._tensors(self.config.gradient_accumulation_steps)
        count, held = self._count(len(tape))
        frame = self._play_new("forward", step, tape + count, "inputs")
        if self._batch is not None:
            before, frees = self._batch
            self.program.play("forward", step, before, frees)
        self._batch = frame, [(slot, 0) for slot in (*range(len(tape)), held)]

    def _tensors(self, num_batches: int) -> Tape:
        """input_ids, labels and, where rows are padded or the collator makes one anyway, attention_mask: int64 each."""
        num_tensors = 3 if self.config.padding or self.config.stack == "trl" else 2
        size = round_block(self.config.tokens_per_micro_batch * 8)
        return [(slot, size) for slot in range(num_tensors * num_batches)]

    def _count(self, slot: int) -> tuple[Tape, int]:
        """`_get_num_items_in_batch`: sum(labels[..., 1:].ne(-100).sum() for ...); also the slot of the result."""
        config, tape = self.config, []
        differs = round_block(config.micro_batch_size * (config.seq_len - 1))
        held = -1
        for _ in range(config.gradient_accumulation_steps):
            if differs:
                tape += [(slot, differs), (slot + 1, BLOCK_BYTES), (slot, 0)]
            tape += [(slot + 2, BLOCK_BYTES)]
            if differs:
                tape.append((slot + 1, 0))
            if held >= 0:
                tape.append((held, 0))
            held = slot + 2
            slot += 3
        return tape, held

    def end_micro_step(self, step: int, frame: int, slot: int) -> None:
        """The graph is gone; the loss itself stays until the next one is there."""
        if not self.is_trainer:
            return
        if self._loss is not None:
            self.program.play("backward", step, self._loss[0], [(self._loss[1], 0)])
        self._loss = frame, slot
        # torch.isnan(tr_loss_step) or torch.isinf(tr_loss_step)
        block = BLOCK_BYTES
        self._play_new("backward", step, [(0, block), (0, 0), (1, block), (2, block), (1, 0), (2, 0)], "loss")

    def clip(self, step: int, tape: Tape) -> None:
        """Clipping. The trainers take the norm also where nothing is clipped, and keep it."""
        program = self.program
        phase = "clip" if self.config.max_grad_norm else "backward"
        if self._norm is not None:
            program.play("backward", step, self._norm[0], [(self._norm[1], 0)])
        kept: int | None = None
        if self.is_trainer and tape:
            kept, size = tape[-1]  # the total norm dies last
            assert size == 0
            tape = tape[:-1]
        frame = self._play_new(phase, step, tape, "temporaries")
        self._norm = None if kept is None else (frame, kept)

    def _play_new(self, phase: str, step: int, tape: Tape, kind: str) -> int:
        frame = self.program.frame_for(tape, kind)
        self.program.play(phase, step, frame, tape)
        return frame
