"""torch.utils.checkpoint: keep a layer's input, run its forward again when backward needs what it saved.

Non-reentrant (torch 2.11 torch/utils/checkpoint.py `_checkpoint_without_reentrant_generator`): forward runs with a
graph whose saved tensors are placeholders; the first one that backward unpacks runs the whole forward again, which
stops as soon as the last saved tensor exists (`_StopRecomputationError`); each recomputed tensor dies with the node
that unpacks it, the input with the last of them.
Reentrant (`CheckpointFunction`): forward without a graph; backward runs forward with one, then a nested backward.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import ref

from memplan.ops.autograd import Grads, Node, attach, expect, record, run_backward
from memplan.ops.pointwise import GradList, incoming
from memplan.ops.tensor import Tensor

Outputs = Tensor | tuple[Tensor, Tensor | None]
Forward = Callable[[Tensor], Outputs]


class _StopRecomputation(Exception):
    """All that backward needs is there."""


class _Frame:
    """One checkpointed call: its input, the placeholders of what it saved, and those tensors recomputed.

    Placeholders are held weakly, as torch holds them: what only a graph that is gone had saved is not kept again.
    """

    __slots__ = ("forward", "placeholders", "recomputed", "x")

    def __init__(self, forward: Forward, x: Tensor) -> None:
        self.forward = forward
        self.x = x.view(*x.shape)
        self.x.is_leaf = x.is_leaf
        self.x.storage.mark("activations")
        self.placeholders: list[ref[_Placeholder]] = []
        self.recomputed: list[Tensor | None] | None = None

    def pack(self, tensor: Tensor) -> object:
        placeholder = _Placeholder(self, len(self.placeholders))
        self.placeholders.append(ref(placeholder))
        return placeholder

    def pack_again(self, tensor: Tensor) -> object:
        assert self.recomputed is not None
        index = len(self.recomputed)
        tensor.storage.mark("activations")
        kept = tensor.detach()
        self.recomputed.append(kept if self.placeholders[index]() is not None else None)
        if index + 1 == len(self.placeholders):
            raise _StopRecomputation
        return kept.detach()

    def recompute(self) -> None:
        m = self.x.machine
        before = m.pack, m.grad_enabled, m.cast_cache
        self.recomputed = []
        m.pack, m.grad_enabled, m.cast_cache = self.pack_again, True, {}
        try:
            self.forward(self.x)
        except _StopRecomputation:
            pass
        finally:
            m.pack, m.grad_enabled, m.cast_cache = before


class _Placeholder:
    __slots__ = ("__weakref__", "frame", "index")

    def __init__(self, frame: _Frame, index: int) -> None:
        self.frame = frame
        self.index = index

    def unpack(self) -> Tensor:
        frame = self.frame
        if frame.recomputed is None:
            frame.recompute()
        assert frame.recomputed is not None
        kept = frame.recomputed[self.index]
        frame.recomputed[self.index] = None
        assert kept is not None
        return kept


def checkpoint(forward: Forward, x: Tensor) -> Outputs:
    """forward(x), keeping only x (use_reentrant=False)."""
    m = x.machine
    before = m.pack
    m.pack = _Frame(forward, x).pack
    try:
        return forward(x)
    finally:
        m.pack = before


def checkpoint_reentrant(
    forward: Forward, x: Tensor, read: dict[str, Tensor] | None = None, names: tuple[str, ...] = ()
) -> Outputs:
    """forward(x), keeping only x (use_reentrant=True), and what `forward` finds in `read` by `names`: further
    arguments."""
    m = x.machine
    arguments = [x, *[read[name] for name in names]] if read else [x]
    node = record(m, _reentrant_backward, arguments, arguments, meta=(forward, read, names))
    with m.no_grad():
        result = forward(x)
    if not isinstance(result, tuple):
        return attach(node, result)
    attach(node, result[0])
    if result[1] is not None:
        attach(node, result[1], 1)
    return result


def _reentrant_backward(node: Node, grads: GradList) -> Grads:
    m, (forward, read, names) = node.machine, node.meta
    # torch.autograd.Function makes zeros of the gradients that its outputs did not get
    zeros = [m.empty(shape, dtype) for shape, dtype in node.likes[1:]]
    leaves = [node.unpack(index).detach() for index in range(len(node.saved))]
    for leaf, needed in zip(leaves, node.needs, strict=True):
        leaf.requires_grad = leaf.is_leaf = needed
    x = leaves[0]
    x.requires_grad = x.is_leaf = True
    read |= zip(names, leaves[1:], strict=True)
    before, m.cast_cache = m.cast_cache, {}
    grad_was, m.grad_enabled = m.grad_enabled, True
    result = forward(x)
    m.cast_cache, m.grad_enabled = before, grad_was
    for output in result if isinstance(result, tuple) else (result,):
        if output is not None:
            output.storage.mark("activations")  # held until the layer's backward is over
    if not isinstance(result, tuple):
        run_backward([result], [incoming(grads)])
    else:
        if result[1] is not None:
            expect(result[1], [zeros[0].detach()])
        run_backward([result[0]], [incoming(grads)])
    assert x.node is not None
    grads_of = [None if leaf.node is None else leaf.node.meta for leaf in leaves]
    for name in names:
        del read[name]
    # handles of their own: a leaf that outlives this call, in the graph of keys that layers share, keeps its gradient
    return [None if grad is None else grad.detach() for grad in grads_of]
