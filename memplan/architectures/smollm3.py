"""smollm3: llama with layers that do not rotate queries and keys, and possibly layers with a sliding window.

Source: transformers 5.17 models/smollm3/modeling_smollm3.py. What is special for memory: a layer without rotation keeps
q and k as they were projected.
"""

from __future__ import annotations

from memplan.architectures.llama import Llama

_NO_ROPE = " without rope"


class SmolLM3(Llama):
    def layer_kind(self, index: int) -> str:
        return super().layer_kind(index) + ("" if self.spec.has_rope(index) else _NO_ROPE)

    def has_rope(self, kind: str) -> bool:
        return _NO_ROPE not in kind
