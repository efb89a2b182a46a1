"""How many parameters a folder's safetensors files hold, read from their headers alone.

Format: 8 bytes of the header's length (little-endian), then a JSON object of tensors with `dtype` and `shape`.
An index (`model.safetensors.index.json`) names the file of each tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

MAX_HEADER_BYTES = 100 * 2**20
"""As the safetensors library limits it."""

# Buffers that older transformers saved beside the parameters: rotary frequencies, causal masks.
_BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
# Parts of multimodal checkpoints that are not the language model.
_OTHER_TOWERS = ("vision", "visual", "audio", "projector", "merger", "connector", "image_newline", "embed_image")


@dataclass(frozen=True, slots=True)
class Stored:
    """Elements of the tensors that a checkpoint holds."""

    num_elements: int
    """Without buffers, where the names are known."""
    num_other: int = 0
    """Of these, how many are in a vision or audio tower or its projector."""


def stored_in(folder: Path) -> Stored | None:
    """What the safetensors files of `folder` hold; None where there are none, or a file of the index is missing."""
    try:
        shapes = _shapes(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # a file that cannot be read says nothing of the model
    if not shapes:
        return None
    sizes = {name: prod(shape) for name, shape in shapes.items() if not name.endswith(_BUFFERS)}
    other = sum(size for name, size in sizes.items() if any(part in name for part in _OTHER_TOWERS))
    return Stored(sum(sizes.values()), other)


def _shapes(folder: Path) -> dict[str, list[int]]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _header(single)
    if not index.is_file() or index.stat().st_size > MAX_HEADER_BYTES:
        return {}
    files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    if any(Path(name).name != name for name in files):
        return {}
    shapes: dict[str, list[int]] = {}
    for name in files:
        shapes |= _header(folder / name)
    return shapes


def _header(path: Path) -> dict[str, list[int]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("too large for a header")
        header = json.loads(file.read(length))
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
