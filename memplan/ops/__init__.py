"""A size-only stand-in for PyTorch's eager mode: tensors have a shape, a dtype and a lifetime, but no values.

`tensor`      storages, handles, and the machine that writes every allocation and free on a tape
`autograd`    nodes, saved tensors, and the backward engine with PyTorch's order of execution
`checkpoint`  torch.utils.checkpoint, both variants
`autocast`    torch.autocast with its weight cache
the others    one kind of op each: what it allocates, what it saves for backward, what its backward allocates

A tensor is freed when its last handle goes, exactly as in PyTorch; memplan relies on CPython's reference
counting for that as PyTorch's own Python side does.
"""
