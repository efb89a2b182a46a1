"""Families of models: one class each, one row each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from memplan.architectures.run_checks import check_rotary, check_run
from memplan.errors import UnknownNameError
from memplan.model_spec import ModelSpec
from memplan.ops.device import HOPPER, Device
from memplan.train_config import TrainConfig

if TYPE_CHECKING:
    from memplan.architectures.decoder import Decoder


class Families(Mapping[str, "type[Decoder]"]):
    """Class of each `model_type`, from rows of module and class: a run imports only the module of its own family."""

    def __init__(self, rows: Mapping[str, tuple[str, str]]) -> None:
        self._rows = rows

    def __getitem__(self, model_type: str) -> type[Decoder]:
        module, name = self._rows[model_type]
        family: type[Decoder] = getattr(import_module(f"{__name__}.{module}"), name)
        return family

    def __contains__(self, model_type: object) -> bool:
        return model_type in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


FAMILIES = Families(
    {
        "gpt2": ("gpt2", "GPT2"),
        "gpt_neox": ("gpt_neox", "GPTNeoX"),
        "gptj": ("gptj", "GPTJ"),
        "opt": ("opt", "OPT"),
        "bloom": ("bloom", "Bloom"),
        "falcon": ("falcon", "Falcon"),
        "mpt": ("mpt", "Mpt"),
        "llama": ("llama", "Llama"),
        "llama4_text": ("llama4", "Llama4"),
        "mistral": ("mistral", "Mistral"),
        "ministral3": ("ministral3", "Ministral3"),
        "seed_oss": ("seed_oss", "SeedOss"),
        "mixtral": ("moe", "Mixtral"),
        "qwen3_moe": ("moe", "Qwen3Moe"),
        "qwen2_moe": ("moe", "Qwen2Moe"),
        "qwen3_next": ("qwen3_next", "Qwen3Next"),
        "qwen3_5_text": ("qwen3_5", "Qwen3_5"),
        "olmoe": ("moe", "Olmoe"),
        "gpt_oss": ("gpt_oss", "GptOss"),
        "deepseek_v2": ("deepseek", "DeepseekV2"),
        "deepseek_v3": ("deepseek", "DeepseekV3"),
        "qwen2": ("llama", "Llama"),
        "qwen3": ("llama", "Llama"),
        "granite": ("granite", "Granite"),
        "phi": ("phi", "Phi"),
        "stablelm": ("stablelm", "StableLm"),
        "starcoder2": ("starcoder2", "Starcoder2"),
        "gemma": ("gemma", "Gemma"),
        "gemma2": ("gemma2", "Gemma2"),
        "gemma3_text": ("gemma2", "Gemma3"),
        "gemma3n_text": ("gemma3n", "Gemma3n"),
        "gemma4_text": ("gemma4", "Gemma4"),
        "gemma4_unified_text": ("gemma4", "Gemma4"),
        "phi3": ("phi3", "Phi3"),
        "olmo": ("olmo", "Olmo"),
        "olmo2": ("olmo", "Olmo2"),
        "olmo3": ("olmo", "Olmo3"),
        "smollm3": ("smollm3", "SmolLM3"),
        "exaone4": ("exaone4", "Exaone4"),
        "cohere": ("cohere", "Cohere"),
        "glm": ("glm", "Glm"),
        "glm4": ("glm", "Glm4"),
        "glm4_moe": ("glm4_moe", "Glm4Moe"),
    }
)
"""Family of each `model_type`."""


def decoder_for(spec: ModelSpec, config: TrainConfig, device: Device = HOPPER) -> Decoder:
    """The architecture of `spec` for the run `config` on `device`.

    Raises:
        UnknownNameError: a `model_type` that has no family yet.
        MemplanError: attention that the family does not have, or a model that its classes cannot run.
    """
    family = FAMILIES.get(spec.model_type)
    if family is None:
        raise UnknownNameError("model_type", spec.model_type, FAMILIES)
    check_run(spec, config, supports_sdpa=family.supports_sdpa)
    decoder = family(spec, config, device)
    for kind in ("full_attention", "sliding_attention"):
        check_rotary(spec, decoder.rotary_dim_of(kind))
    return decoder
