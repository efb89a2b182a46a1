"""Element types and what one element takes."""

from __future__ import annotations

from enum import Enum


class DType(Enum):
    """A torch dtype by its short name; `.itemsize` is bytes per element."""

    fp32 = ("fp32", 4)
    bf16 = ("bf16", 2)
    fp16 = ("fp16", 2)
    int64 = ("int64", 8)
    int32 = ("int32", 4)
    int8 = ("int8", 1)
    uint8 = ("uint8", 1)
    bool8 = ("bool", 1)

    def __init__(self, label: str, itemsize: int) -> None:
        self.label = label
        self.itemsize = itemsize

    @property
    def is_floating(self) -> bool:
        return self in (DType.fp32, DType.bf16, DType.fp16)

    @property
    def is_half(self) -> bool:
        return self in (DType.bf16, DType.fp16)
