"""Families of models: one class each, one row each."""

from __future__ import annotations

from memplan.architectures.bloom import Bloom
from memplan.architectures.cohere import Cohere
from memplan.architectures.decoder import Decoder
from memplan.architectures.deepseek import DeepseekV2, DeepseekV3
from memplan.architectures.falcon import Falcon
from memplan.architectures.gemma import Gemma
from memplan.architectures.gemma2 import Gemma2, Gemma3
from memplan.architectures.glm import Glm, Glm4
from memplan.architectures.gpt2 import GPT2
from memplan.architectures.gpt_neox import GPTNeoX
from memplan.architectures.gpt_oss import GptOss
from memplan.architectures.gptj import GPTJ
from memplan.architectures.granite import Granite
from memplan.architectures.llama import Llama
from memplan.architectures.mistral import Mistral
from memplan.architectures.moe import Mixtral, Olmoe, Qwen2Moe, Qwen3Moe
from memplan.architectures.mpt import Mpt
from memplan.architectures.olmo import Olmo, Olmo2, Olmo3
from memplan.architectures.phi import Phi
from memplan.architectures.opt import OPT
from memplan.architectures.phi3 import Phi3
from memplan.architectures.smollm3 import SmolLM3
from memplan.architectures.stablelm import StableLm
from memplan.architectures.starcoder2 import Starcoder2
from memplan.errors import UnknownNameError
from memplan.model_spec import ModelSpec
from memplan.ops.device import HOPPER, Device
from memplan.train_config import TrainConfig

FAMILIES: dict[str, type[Decoder]] = {
    "gpt2": GPT2,
    "gpt_neox": GPTNeoX,
    "gptj": GPTJ,
    "opt": OPT,
    "bloom": Bloom,
    "falcon": Falcon,
    "mpt": Mpt,
    "llama": Llama,
    "mistral": Mistral,
    "mixtral": Mixtral,
    "qwen3_moe": Qwen3Moe,
    "qwen2_moe": Qwen2Moe,
    "olmoe": Olmoe,
    "gpt_oss": GptOss,
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
    "qwen2": Llama,
    "qwen3": Llama,
    "granite": Granite,
    "phi": Phi,
    "stablelm": StableLm,
    "starcoder2": Starcoder2,
    "gemma": Gemma,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "phi3": Phi3,
    "olmo": Olmo,
    "olmo2": Olmo2,
    "olmo3": Olmo3,
    "smollm3": SmolLM3,
    "cohere": Cohere,
    "glm": Glm,
    "glm4": Glm4,
}
"""Family of each `model_type`."""


def decoder_for(spec: ModelSpec, config: TrainConfig, device: Device = HOPPER) -> Decoder:
    """The architecture of `spec` for the run `config` on `device`.

    Raises:
        UnknownNameError: a `model_type` that has no family yet.
    """
    family = FAMILIES.get(spec.model_type)
    if family is None:
        raise UnknownNameError("model_type", spec.model_type, FAMILIES)
    return family(spec, config, device)
