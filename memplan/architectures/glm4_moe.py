"""glm4_moe (GLM-4.5): llama's attention, of which half of each head rotates, and deepseek_v3's experts and router.

Source: transformers 5.17 models/glm4_moe/modeling_glm4_moe.py.
"""

from __future__ import annotations

from memplan.architectures.deepseek_moe import SigmoidMoe


class Glm4Moe(SigmoidMoe):
    norms_heads_last = True
