"""A plain training loop on fake tensors, and the phases that every loop is measured by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.oracle.tracker import Tracker

Batch = dict[str, torch.Tensor]
Tensors = list[torch.nn.Parameter]
PHASES = ("forward", "backward", "clip", "optimizer", "zero_grad")


class Phases:
    """Figures of each phase of each step: `steps[step][name]` = (allocated at its end, peak within it), bytes.

    Phases are seamless: one ends where the next begins. Of a phase that a step goes through several times, the end is
    that of the last time.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.steps: list[dict[str, tuple[int, int]]] = []
        self._tracker = tracker
        self._name = ""

    def begin(self, name: str, step: int) -> None:
        self.end()
        if step == len(self.steps):
            self.steps.append({})
        self._name, self._tracker.step = name, step
        self._tracker.begin(name)

    def end(self) -> None:
        if self._name:
            alloc, peak = self._tracker.end()
            done = self.steps[-1]
            done[self._name] = alloc, max(peak, done.get(self._name, (0, 0))[1])
            self._name = ""

    def beginning(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with `name` beginning where it is called."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self.begin(name, len(self.steps) - 1)
            return function(*args, **kwargs)

        return called


def train(
    compute_loss: Callable[[Batch], torch.Tensor],
    trainable: Tensors,
    optimizer: torch.optim.Optimizer,
    inputs: Batch,
    phases: Phases,
    num_steps: int,
    accumulation: int,
) -> None:
    """memplan's own loop (calibration/loop.py): one batch for the whole run; the loss is held until clipping."""
    for step in range(num_steps):
        for _ in range(accumulation):
            phases.begin("forward", step)
            loss = compute_loss(inputs)
            if accumulation > 1:
                loss = loss / accumulation
            phases.begin("backward", step)
            loss.backward()
            phases.begin("clip", step)
            # The loss holds its graph's leaves (an embedding made to require grad, and its gradient) until here.
            del loss
        torch.nn.utils.clip_grad_norm_(trainable, 1.0, foreach=True)
        phases.begin("optimizer", step)
        optimizer.step()
        phases.begin("zero_grad", step)
        optimizer.zero_grad(set_to_none=True)
    phases.end()
