"""gemma: llama with scaled embeddings, tied to the head, and norms that multiply by 1 + weight in fp32.

Source: transformers 5.17 models/gemma/modeling_gemma.py. What is special for memory: the scaling of the embeddings is a
product of its own, and a norm keeps two fp32 tensors of its input's size and no half one.
"""

from __future__ import annotations

from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Norm
from memplan.architectures.llama import Llama
from memplan.ops.tensor import Tensor


class Gemma(Llama):
    def embed(self, build: Builder) -> Tensor:
        """`GemmaTextScaledWordEmbedding`: rows of the table times a scalar on the device."""
        spec, name = self.spec, self.embedding_name
        embed_scale = build.buffer(f"{name}.embed_scale", (), build.dtype)
        return self.as_leaf(build.embedding(name, spec.vocab_size, spec.hidden_size, embed_scale)(self.batch))

    def norm(self, build: Builder, name: str, width: int) -> Norm:
        return build.offset_rms_norm(name, width)
