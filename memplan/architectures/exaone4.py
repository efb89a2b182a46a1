"""exaone4: olmo2's norms after attention and MLP, gemma3's norms by head, smollm3's layers without rotation.

Source: transformers 5.17 models/exaone4/modeling_exaone4.py. Where the config has a sliding window, the layers with
full attention do not rotate queries and keys, which reach attention from their norms.
"""

from __future__ import annotations

from memplan.architectures.norms_after import NormsAfter
from memplan.architectures.smollm3 import SmolLM3


class Exaone4(NormsAfter, SmolLM3):
    norms_heads_last = True
