"""What the user of any decoder should know of a run: what is left out of the model, how its checkpoint is stored,
positions beyond the model's, attention that its family lacks, what int8 keeps in 16 bits, a loss that the
stack does not compute or that Liger does not replace."""

from __future__ import annotations

from memplan.model_spec import ModelSpec
from memplan.ops.loss_liger import builds_logits
from memplan.prequantized import storage_warnings
from memplan.train_config import LOSSES, TrainConfig


def run_warnings(spec: ModelSpec, config: TrainConfig, attention: str) -> list[str]:
    """One sentence each; `attention` is what runs, whatever the config asks for."""
    return [
        *spec.left_out,
        *storage_warnings(spec, config),
        *_positions(spec, config),
        *_attention(spec, config, attention),
        *_outliers(config),
        *_loss(config),
        *_liger(spec, config),
    ]


def _positions(spec: ModelSpec, config: TrainConfig) -> list[str]:
    positions = spec.max_position_embeddings
    if positions is None or config.seq_len <= positions:
        return []
    return [
        f"`seq_len` {config.seq_len:,} is beyond the {positions:,} positions of the model (`max_position_embeddings`): "
        "models with learned positions cannot run it, others were not trained for it"
    ]


def _attention(spec: ModelSpec, config: TrainConfig, attention: str) -> list[str]:
    if attention == "flash_attention_2":
        return [
            "flash-attn's kernels are counted as those of PyTorch's sdpa and were not measured; "
            "with padding they unpad, which is not counted"
        ]
    if attention == config.attention:
        return []
    return [
        f"transformers has no {config.attention} attention for `{spec.model_type}`: {attention} runs in its place, "
        "which keeps the probabilities [batch, heads, tokens, tokens] of each layer"
    ]


def _outliers(config: TrainConfig) -> list[str]:
    """bitsandbytes autograd/_functions.py `MatMul8bitLt` (threshold 6.0)."""
    if config.method != "qlora" or config.quant_type != "int8":
        return []
    return [
        "LLM.int8() keeps columns with an activation of 6.0 or more as they are: how many depends on data; they are "
        "counted as for fresh weights, a trained model may have more or fewer"
    ]


_LOSS_OF = {
    "trainer": "transformers 5.17's Trainer takes the model's own loss, or Liger's",
    "trl": "TRL 1.16's SFTTrainer computes its loss in chunks and refuses Liger's; earlier releases made full logits",
}


def _loss(config: TrainConfig) -> list[str]:
    if config.loss in LOSSES[config.stack]:
        return []
    return [f"{_LOSS_OF[config.stack]}: `{config.loss}` is estimated as asked, and was not measured with that stack"]


def _liger(spec: ModelSpec, config: TrainConfig) -> list[str]:
    if config.loss != "liger" or not builds_logits("liger", spec.model_type):
        return []
    return [f"Liger has no fused loss for `{spec.model_type}`: the model makes its full logits all the same"]
