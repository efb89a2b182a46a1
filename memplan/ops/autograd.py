"""The graph and the backward engine: what autograd saves, in what order it runs, and when it lets go.

Follows torch 2.11 torch/csrc/autograd/engine.cpp and input_buffer.cpp:

- ready nodes run highest sequence number first, gradient accumulators before all others;
- a node's incoming gradients die when its function returns (`call_function`), then its saved tensors
  (`release_variables`), then its outputs move into the next nodes' buffers;
- a gradient of another size or dtype than the tensor it belongs to is summed and cast at once
  (`validate_outputs`): the broadcast and promotion of the forward, undone;
- a second gradient for the same input is added in place when the buffer holds the only handle on the first
  (`can_accumulate_inplace`), into a new tensor otherwise; on an H200 also when the first is the reshaped result of
  a matrix product (allocation traces of 2026-11-22);
- the first gradient of a leaf is kept as it is when nobody else holds it, and copied otherwise
  (torch/csrc/autograd/functions/accumulate_grad.h).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from memplan.dtypes import DType
from memplan.ops.reduction import reduction_scratch, use_scratch
from memplan.ops.tensor import Machine, Parameter, Shape, Tensor

Grads = Sequence[Tensor | None]
Backward = Callable[["Node", list[Tensor | None]], Grads]

_FIRST = -(2**62)  # sequence number of an accumulator, negated: UINT64_MAX in torch, so it is always next


class Node:
    """One backward function: where its outputs go, what it saved, and the sizes it needs."""

    __slots__ = (
        "backward", "buffer", "edges", "kept", "kind", "leaf", "likes", "machine", "meta", "missing", "needs", "order",
        "saved",
    )  # fmt: skip

    def __init__(self, machine: Machine, backward: Backward, edges: list[tuple[Node, int] | None]) -> None:
        self.machine = machine
        self.backward = backward
        self.kind = machine.kind
        """What its backward allocates is for what its forward was for."""
        self.edges = edges
        self.saved: tuple[Any, ...] = ()
        self.likes: list[tuple[Shape, DType]] = []
        self.meta: Any = None
        self.kept: Any = None
        """An attribute of the context that no hook sees: it lives as long as the node."""
        self.leaf: Tensor | None = None
        self.buffer: list[Tensor | None] | None = None
        self.missing = 0
        self.needs = [edge is not None for edge in edges]
        self.order = -machine.seq
        machine.seq += 1

    def unpack(self, index: int = 0) -> Tensor:
        """The saved tensor `index`, recomputed first where a checkpoint left a placeholder."""
        saved = self.saved[index]
        return saved if isinstance(saved, Tensor) else saved.unpack()

    def release(self) -> None:
        """Lets go of the saved tensors, first to last (a tuple would do it last to first)."""
        saved, self.saved = list(reversed(self.saved)), ()
        while saved:
            saved.pop()


def edge_of(tensor: Tensor) -> tuple[Node, int] | None:
    """Where the gradient of `tensor` goes: its node, or the accumulator of a leaf; None if it needs none."""
    if not tensor.requires_grad:
        return None
    if tensor.node is None:
        tensor.node = accumulator_of(tensor)
    return tensor.node, tensor.node_output


def accumulator_of(leaf: Tensor) -> Node:
    node = Node(leaf.machine, _accumulate_grad, [])
    node.order = _FIRST
    # A parameter outlives the step; another leaf (embeddings made to require grad) is kept by its accumulator.
    if isinstance(leaf, Parameter):
        node.leaf = leaf
    else:
        node.leaf = leaf.detach()
        leaf.storage.mark("activations")
    node.likes.append((leaf.shape, leaf.dtype))
    return node


def record(
    machine: Machine, backward: Backward, inputs: Sequence[Tensor], save: Sequence[Tensor] = (), meta: Any = None
) -> Node | None:
    """The node of an op over `inputs`, or None where no gradient is needed.

    Call it before the op allocates its result, as PyTorch makes the node and saves inputs first; results are
    saved afterwards with `save_result`.
    """
    if not machine.grad_enabled:
        return None
    edges = [edge_of(t) for t in inputs]
    if not any(edges):
        return None
    node = Node(machine, backward, edges)
    node.meta = meta
    if save:
        node.saved = tuple([pack(machine, t) for t in save])
    return node


def pack(machine: Machine, tensor: Tensor) -> object:
    """What a node keeps of `tensor`: a handle, or what the checkpoint in force makes of it."""
    if machine.pack is not None:
        return machine.pack(tensor)
    tensor.storage.mark("activations")
    return tensor.detach()


def save_result(node: Node | None, *results: Tensor) -> None:
    """Saves results of the op beside what its node has."""
    if node is not None:
        node.saved = (*node.saved, *[pack(node.machine, t) for t in results])


def attach(node: Node | None, result: Tensor, output: int = 0) -> Tensor:
    """Makes `result` output number `output` of `node`; returns it."""
    if node is not None:
        result.node, result.node_output, result.requires_grad = node, output, True
        assert len(node.likes) == output
        node.likes.append((result.shape, result.dtype))
    return result


def result_of(node: Node | None, machine: Machine, shape: Shape, dtype: DType) -> Tensor:
    """A new tensor that is the output of `node`."""
    return attach(node, machine.empty(shape, dtype))


def _accumulate_grad(node: Node, grads: list[Tensor | None]) -> Grads:
    leaf, grad = node.leaf, grads[0]
    assert leaf is not None and grad is not None
    held = leaf.grad if isinstance(leaf, Parameter) else node.meta
    if held is None:
        kept = grad.detach() if grad.storage.refs == 1 else node.machine.empty(grad.shape, grad.dtype)
        kept.storage.mark("gradients")
        if isinstance(leaf, Parameter):
            leaf.grad = kept
        else:
            node.meta = kept
    # Otherwise the gradient is added in place and nothing is allocated.
    return ()


def expect(tensor: Tensor, gradient: list[Tensor]) -> None:
    """Puts a gradient of `tensor` that comes from elsewhere, taken out of the list, where the next is added to it."""
    edge = edge_of(tensor)
    assert edge is not None
    assert edge[1] == 0
    edge[0].buffer = [gradient.pop()]


def run_backward(roots: Sequence[Tensor], grads_in: list[Tensor]) -> None:
    """Runs the graph below `roots` from their gradients in `grads_in`, which are taken out of that list: a handle that
    the caller kept would forbid adding to it in place."""
    edges = [edge for edge in map(edge_of, roots) if edge is not None]
    _count_dependencies([start for start, _ in edges])
    ready: list[tuple[int, int, Node]] = []
    for start, output in edges:
        _deliver(start, output, grads_in.pop(0))
    for pushed, (start, _) in enumerate(edges):
        if not start.missing:
            heapq.heappush(ready, (start.order, pushed, start))
    pushed = len(edges)
    while ready:
        node = heapq.heappop(ready)[2]
        grads = node.buffer
        assert grads is not None
        node.buffer = None
        machine = node.machine
        before, machine.kind = machine.kind, node.kind
        outputs = list(node.backward(node, grads))
        _validate(node, outputs)
        machine.kind = before
        del grads
        node.release()
        for index, next_edge in enumerate(node.edges):
            if next_edge is None:
                continue
            next_node, next_output = next_edge
            gradient = outputs[index]
            outputs[index] = None
            if gradient is not None:
                _deliver(next_node, next_output, gradient)
            del gradient
            next_node.missing -= 1
            if next_node.missing == 0 and next_node.buffer is not None:
                heapq.heappush(ready, (next_node.order, pushed, next_node))
                pushed += 1


def _count_dependencies(starts: list[Node]) -> None:
    seen = {id(start) for start in starts}
    stack = list(starts)
    while stack:
        for edge in stack.pop().edges:
            if edge is not None:
                node = edge[0]
                node.missing += 1
                if id(node) not in seen:
                    seen.add(id(node))
                    stack.append(node)


def _validate(node: Node, outputs: list[Tensor | None]) -> None:
    for index, edge in enumerate(node.edges):
        if edge is None:
            continue
        gradient = outputs[index]
        if gradient is None:
            continue
        shape, dtype = edge[0].likes[edge[1]]
        if gradient.shape != shape:
            alike = prod(gradient.shape) == prod(shape)
            outputs[index] = gradient = _seen_as(gradient, shape) if alike else _reduced(gradient, shape)
        if gradient.dtype is not dtype:
            outputs[index] = node.machine.empty(shape, dtype)
        del gradient


def _seen_as(gradient: Tensor, shape: Shape) -> Tensor:
    """The gradient of a tensor that was used through a view: views have no node of their own here."""
    seen = Tensor(gradient.storage, shape, gradient.dtype)
    seen.is_reshaped = gradient.is_reshaped
    return seen


def _reduced(gradient: Tensor, shape: Shape) -> Tensor:
    """The sum of `gradient` down to `shape`, with the staging buffer that a sum over many rows takes."""
    m = gradient.machine
    out = m.empty(shape, gradient.dtype)
    out.is_reshaped = len(shape) < len(gradient.shape)  # at::sum_to drops leading dimensions by a view
    if m.device.is_cuda and prod(shape) == shape[-1]:
        rows = gradient.numel // shape[-1]
        use_scratch(m, reduction_scratch(rows, shape[-1], gradient.dtype, m.device, reduces_last=False))
    return out


def _deliver(node: Node, output: int, gradient: Tensor) -> None:
    if node.buffer is None:
        node.buffer = []
    buffer = node.buffer
    while len(buffer) <= output:
        buffer.append(None)
    held = buffer[output]
    if held is None:
        buffer[output] = kept = gradient.detach()
        kept.is_reshaped = gradient.is_reshaped
        kept.shape = node.likes[output][0]  # a view on the way has no node that would restore it
    elif held.storage.refs != 1 or held.is_reshaped:
        buffer[output] = node.machine.empty(held.shape, held.dtype)
