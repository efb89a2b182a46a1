"""Live bytes of a run on fake tensors: every storage, from the op that makes it to the release of its last reference.

A storage is watched through a weak reference to its Python object. PyTorch keeps that object alive for as long as
the C++ storage lives ("PyObject preservation"), so the callback fires at the very place where CUDA's caching
allocator would get the block back. The tracker itself holds weak references and numbers, never a tensor.

Bytes are rounded up to 512 per storage, the allocator's `kMinBlockSize` (c10/cuda/CUDACachingAllocator.cpp).

One lifetime differs between a traced and a plain run, and is put right here: autograd's `InputBuffer` sums two
incoming gradients in place when it owns the first one (torch/csrc/autograd/input_buffer.cpp, `can_accumulate_inplace`),
but out of place under any dispatch mode (`isTensorSubclassLike`). The storage of the first gradient is freed right
after such an addition exactly when autograd owned it, so the pair (new sum, freed gradient) is undone.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_BLOCK = 512
_DISPATCH_MODULES = (__name__, "torch._compile", "torch._dynamo.eval_frame", "torch.utils._python_dispatch")


class Event(NamedTuple):
    """One allocation (`num_bytes` > 0) or free (< 0). `step` is -1 while the model is loaded."""

    step: int
    phase: str
    num_bytes: int
    storage: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    where: str
    live_bytes: int


@dataclass
class _Storage:
    number: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    where: str
    ref: Any


def block_bytes(num_bytes: int) -> int:
    """What the caching allocator counts as allocated for a request of `num_bytes`."""
    return -(-num_bytes // _BLOCK) * _BLOCK


def _called_by_engine() -> bool:
    """Whether autograd's engine itself, and no Python function, dispatched the op at hand."""
    if torch._C._current_autograd_node() is None:
        return False
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in _DISPATCH_MODULES and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


class Tracker(TorchDispatchMode):
    """Counts live bytes while it is the active dispatch mode above a FakeTensorMode.

    What CUDA does where the CPU build does otherwise comes in tables by op overload: `kernels`, a function that runs in
    the op's place, itself tracked (or returns NotImplemented); `outputs`, a function that replaces what the op
    returned; `host`, which of several results lie in host memory; `scratch`, the bytes that its kernel takes and gives
    back inside, at its end or where the list has them once more below zero.
    """

    def __init__(
        self,
        *,
        record: bool = False,
        kernels: dict[Any, Callable[..., Any]] | None = None,
        outputs: dict[Any, Callable[..., Any]] | None = None,
        scratch: dict[Any, Callable[..., list[int]]] | None = None,
        host: dict[Any, tuple[int, ...]] | None = None,
        scalar: Callable[[torch.Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self.events: list[Event] | None = [] if record else None
        self.live_bytes = 0
        self.peak_bytes = 0
        self.step = -1
        self.phase = "load"
        self.module_names: dict[int, str] = {}
        self._kernels = kernels or {}
        self._outputs = outputs or {}
        self._scratch = scratch or {}
        self._host_outputs = host or {}
        self._scalar = scalar
        self._live: dict[int, _Storage] = {}
        self._num_storages = 0
        self._host = 0
        self._host_keys: set[int] = set()
        self._summed: tuple[int, int] | None = None  # (storage of a sum just made, storage of its first term)

    # --- phases -----------------------------------------------------------------------------------------------
    def begin(self, phase: str) -> None:
        self._settle()
        self.phase = phase
        self.peak_bytes = self.live_bytes

    def end(self) -> tuple[int, int]:
        """(allocated now, peak since `begin`), in bytes."""
        self._settle()
        return self.live_bytes, self.peak_bytes

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Tensors made inside live in host memory: not counted."""
        self._host += 1
        try:
            yield
        finally:
            self._host -= 1

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._host_keys

    # --- storages ---------------------------------------------------------------------------------------------
    def watch(self, tensor: torch.Tensor, op: str = "", where: str = "") -> bool:
        """Start counting the storage under `tensor`; False if it is known already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return False
        num_bytes = 0 if self._host else block_bytes(storage.nbytes())
        if self._host:
            self._host_keys.add(key)
        self._num_storages += 1
        ref = weakref.ref(storage, lambda _, key=key: self._released(key))
        self._live[key] = _Storage(
            self._num_storages, num_bytes, tuple(tensor.shape), str(tensor.dtype)[6:], op, where, ref
        )
        return True

    def live_storages(self) -> list[tuple[int, tuple[int, ...], str, str, str]]:
        """(bytes, shape, dtype, op, where) of everything alive, largest first."""
        found = [(s.num_bytes, s.shape, s.dtype, s.op, s.where) for s in self._live.values() if s.num_bytes]
        return sorted(found, key=lambda row: -row[0])

    def _allocate(self, key: int) -> None:
        storage = self._live[key]
        self.live_bytes += storage.num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        self._log(storage, storage.num_bytes)

    def _log(self, storage: _Storage, num_bytes: int) -> None:
        if self.events is not None and num_bytes:
            self.events.append(
                Event(
                    self.step,
                    self.phase,
                    num_bytes,
                    storage.number,
                    storage.shape,
                    storage.dtype,
                    storage.op,
                    storage.where,
                    self.live_bytes,
                )
            )

    def _released(self, key: int) -> None:
        storage = self._live[key]
        self._host_keys.discard(key)
        if self._summed is not None and self._summed[1] == key:
            # In-place sum: the new storage is the old one under another name.
            summed = self._live[self._summed[0]]
            summed.number, summed.num_bytes = storage.number, storage.num_bytes
            self._summed = None
            del self._live[key]
            return
        if self._summed is not None and self._summed[0] != key:
            self._settle()
        del self._live[key]
        self.live_bytes -= storage.num_bytes
        self._log(storage, -storage.num_bytes)

    def _settle(self) -> None:
        if self._summed is not None:
            key, self._summed = self._summed[0], None
            self._allocate(key)

    # --- ops --------------------------------------------------------------------------------------------------
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and self._scalar is not None:
            return self._scalar(args[0])
        out = NotImplemented
        if func in self._kernels:
            with self:
                out = self._kernels[func](*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
            if func in self._outputs:
                out = self._outputs[func](out, *args, **kwargs)
        scratch = self._scratch.get(func)
        if isinstance(out, torch.Tensor):
            self._made(func, args, out, scratch and scratch(out, *args, **kwargs))
        elif isinstance(out, tuple | list):
            sizes = scratch and scratch(out, *args, **kwargs)
            on_host = self._host_outputs.get(func, ())
            for number, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    with self.on_host() if number in on_host else nullcontext():
                        self._made(func, args, item, None)
                elif isinstance(item, tuple | list):
                    for inner in item:
                        self._made(func, args, inner, None)
            self._borrow(func, sizes)
        return out

    def _made(self, func: Any, args: tuple[Any, ...], out: torch.Tensor, sizes: list[int] | None) -> None:
        if out.untyped_storage()._cdata not in self._live:
            self._settle()
            key = out.untyped_storage()._cdata
            where = self._where() if self.events is not None else ""
            with self.on_host() if self._host_keys and self._from_host(args) else nullcontext():
                self.watch(out, str(func), where)
            if func is aten.add.Tensor and self._owned_sum(args):
                self._summed = (key, args[0].untyped_storage()._cdata)
            else:
                self._allocate(key)
        self._borrow(func, sizes)

    def _borrow(self, func: Any, sizes: list[int] | None) -> None:
        """Bytes that the CUDA kernel of `func` holds only while it runs."""
        if not sizes:
            return
        self._settle()
        where = self._where() if self.events is not None else ""
        taken: list[_Storage] = []
        for size in sizes:
            if size < 0:
                self._give_back(taken, block_bytes(-size))
                continue
            self._num_storages += 1
            storage = _Storage(self._num_storages, block_bytes(size), (size,), "scratch", str(func), where, None)
            taken.append(storage)
            self.live_bytes += storage.num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._log(storage, storage.num_bytes)
        while taken:
            self._give_back(taken, taken[-1].num_bytes)

    def _give_back(self, taken: list[_Storage], num_bytes: int) -> None:
        """The last of `taken` of that size."""
        storage = next(storage for storage in reversed(taken) if storage.num_bytes == num_bytes)
        taken.remove(storage)
        self.live_bytes -= num_bytes
        self._log(storage, -num_bytes)

    def _from_host(self, args: tuple[Any, ...]) -> bool:
        """Whether every tensor in `args`, one at least, lives on the host."""
        tensors = [item for item in tree_leaves(args) if isinstance(item, torch.Tensor)]
        return bool(tensors) and all(item.untyped_storage()._cdata in self._host_keys for item in tensors)

    def _owned_sum(self, args: tuple[Any, ...]) -> bool:
        """Whether `add(*args)` is autograd summing two gradients, the first of them dense."""
        if self.phase != "backward" or torch.is_grad_enabled() or len(args) < 2:
            return False
        first, second = args[0], args[1]
        if not (isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)):
            return False
        if not _called_by_engine() or first.shape != second.shape or first.dtype != second.dtype:
            return False
        if first.untyped_storage()._cdata == second.untyped_storage()._cdata:
            return False
        if first._is_view():  # its autograd metadata holds the base, and so a second reference to the storage
            return False
        return bool(torch.ops.aten.is_non_overlapping_and_dense(first))

    def _where(self) -> str:
        """The module whose forward is running, or the autograd node."""
        frame = sys._getframe(2)
        found = ""
        while frame is not None:
            if frame.f_code.co_name == "forward":
                local = frame.f_locals
                name = self.module_names.get(id(local.get("self")))
                if isinstance(local, dict):  # before Python 3.13 a copy, which would keep what the function lets go of
                    local.clear()
                if name is not None:
                    found = name
                    break
            frame = frame.f_back  # type: ignore[assignment]
        node = torch._C._current_autograd_node() if self.phase == "backward" else None
        return f"{found} <{node.name()}>" if node is not None and not torch.is_grad_enabled() else found
