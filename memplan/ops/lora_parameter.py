"""A LoRA adapter on a bare parameter, as PEFT 0.21.2 runs it (tuners/lora/layer.py `ParamWrapper`).

The adapter cannot be applied beside a product that the module makes by itself, so the weight is replaced for the time
of the module's forward: by weight + scaling * lora_B · lora_A, a tensor of the size of the whole weight. It is made
once on trial when `torch.nn.utils.parametrize` registers it and once when the module first reads it; the second one
is kept for backward where the module's input needs a gradient, for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from memplan.ops.autograd import attach, edge_of, record
from memplan.ops.grouped_mm import batched_add
from memplan.ops.linear import bmm
from memplan.ops.pointwise import add, mul_number, same_size_backward, to
from memplan.ops.tensor import Parameter, Shape, Tensor

Active = dict[int, Tensor]
"""The replaced weights of a module while its forward runs: made on first reading, then cached."""


@dataclass(slots=True)
class BareParameter:
    """A parameter that its module multiplies by itself: weight [E, out, in], or [out, in], with lora_A [E * rank, in]
    and lora_B [out, E * rank] where it is adapted."""

    weight: Parameter
    lora_A: Parameter | None = None
    lora_B: Parameter | None = None
    factors: tuple[Tensor, ...] = ()

    def read(self, active: Active) -> Tensor:
        """The weight as the module sees it."""
        if self.lora_A is None:
            return self.weight
        held = active.get(id(self))
        if held is None:
            held = active[id(self)] = self._replaced()
        return held

    def begin(self) -> None:
        """`_activate_lora`: what the weight is replaced by, made once on trial."""
        self.factors = (self._delta(),) if len(self.weight.shape) == 2 else self._delta_factors()
        trial = self._replaced()
        del trial

    def _replaced(self) -> Tensor:
        if len(self.factors) == 1:
            return add(self.weight, self.factors[0])
        return batched_add(self.weight, *self.factors)

    def _delta(self) -> Tensor:
        """`Linear.get_delta_weight`"""
        assert self.lora_A is not None and self.lora_B is not None
        delta = mul_number(bmm(self.lora_B, self.lora_A, self.weight.shape))
        return to(delta, self.weight.dtype)

    def _delta_factors(self) -> tuple[Tensor, Tensor]:
        """`get_delta_factors`: views of the adapter by expert, cast to the weight's dtype.

        lora_B is laid out by output first, so that its gradient is copied back into that order.
        """
        assert self.lora_A is not None and self.lora_B is not None
        num_experts, out_features, in_features = self.weight.shape
        rank = self.lora_A.shape[0] // num_experts
        node = record(self.weight.machine, same_size_backward, (self.lora_B,))
        up = attach(node, Tensor(self.lora_B.storage, (num_experts, out_features, rank), self.lora_B.dtype))
        left = to(up, self.weight.dtype)
        right = to(_seen_as(self.lora_A, (num_experts, rank, in_features)), self.weight.dtype)
        return left, right


def _seen_as(leaf: Parameter, shape: Shape) -> Tensor:
    """A view of a parameter, whose gradient arrives in that shape."""
    view = Tensor(leaf.storage, shape, leaf.dtype)
    edge = edge_of(leaf)
    if edge is not None and leaf.machine.grad_enabled:
        view.node, view.node_output = edge
        view.requires_grad = True
    return view


@contextmanager
def activated(*parameters: BareParameter) -> Iterator[Active]:
    """Forward of the wrappers of one module, outermost first: what its parameters read as inside."""
    adapted = [p for p in parameters if p.lora_A is not None]
    active: Active = {}
    for parameter in adapted:
        parameter.begin()
    try:
        yield active
    finally:
        for parameter in reversed(adapted[1:]):
            parameter.factors = ()
        active.clear()
        for parameter in adapted[:1]:
            parameter.factors = ()
