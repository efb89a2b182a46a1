"""mistral: llama with one mask for all layers, that of a sliding window where the config has one.

Source: transformers 5.17 models/mistral/modeling_mistral.py. What is special for memory: a window that is not longer
than the sequence makes a real mask, so sdpa repeats keys and values by heads and every layer keeps its additive mask.
"""

from __future__ import annotations

from memplan.architectures.llama import Llama


class Mistral(Llama):
    def attention_windows(self) -> dict[str, int | None]:
        window = self.spec.sliding_window
        return {"full_attention": None} if window is None else {"sliding_attention": window}
