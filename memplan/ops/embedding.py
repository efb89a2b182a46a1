"""Token embedding (torch 2.11 aten/src/ATen/native/Embedding.cpp, cuda/Embedding.cu `embedding_dense_backward_cuda`).

forward     rows [B, S, width] in the table's dtype, the first hidden states; saves the ids [B, S], an input
backward    if the table trains: zeros [vocab, width] in the rows' dtype, filled: the gradient itself, which stays
            until zero_grad; also for a table of which a batch touches a few rows
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.ops.autograd import Grads, Node, record, result_of
from memplan.ops.pointwise import GradList, incoming, mul, to
from memplan.ops.tensor import Parameter, Tensor


@dataclass(slots=True)
class Embedding:
    """nn.Embedding: weight [vocab, width]; `embed_scale`, where there is one, is a scalar that multiplies the rows."""

    weight: Parameter
    embed_scale: Tensor | None = None
    makes_leaf: bool = False
    """A hook makes the rows require a gradient (`enable_input_require_grads`)."""

    def __call__(self, batch: tuple[int, ...]) -> Tensor:
        return embedding(self, batch)

    def parameters(self) -> list[Parameter]:
        return [self.weight]


def embedding(table: Embedding, batch: tuple[int, ...], ids: Tensor | None = None) -> Tensor:
    """F.embedding of ids [*batch]: [*batch, width] in the table's dtype; saves the ids only, which are `ids` where they
    are no input of the run."""
    weight = table.weight
    m = weight.machine
    node = record(m, _embedding_backward, (weight,), () if ids is None else (ids,), meta=weight.shape)
    rows = result_of(node, m, (*batch, weight.shape[1]), weight.dtype)
    if table.embed_scale is not None:
        rows = mul(rows, to(table.embed_scale, weight.dtype))
    if table.makes_leaf:
        rows.requires_grad = True
    return rows


def _embedding_backward(node: Node, grads: GradList) -> Grads:
    # embedding_dense_backward: zeros of the table's size, filled
    return (node.machine.empty(node.meta, incoming(grads).dtype),)
