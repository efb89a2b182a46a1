"""TrainConfig: one fine-tuning run, as its user states it.

Every field that is left out takes the value that the chosen `stack` gives it (`PRESETS`), so a
`TrainConfig` is always complete: what `print(config)` shows is what is estimated.
`config.model_fields_set` tells what the user said; `config.but(...)` changes some of it.
"""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from memplan.errors import MemplanError

Method = Literal["full", "lora", "qlora"]
METHODS: tuple[Method, ...] = get_args(Method)
Stack = Literal["torch", "trainer", "trl"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
Loss = Literal["full", "chunked", "liger"]
FloatName = Literal["fp32", "bf16", "fp16"]
QuantType = Literal["nf4", "fp4", "int8"]

# What each stack sets when its user says nothing, read from the library's own source.
PRESETS: dict[str, dict[str, Any]] = {
    # A plain loop: forward, backward, clip_grad_norm_, torch.optim.AdamW (foreach on CUDA, its default), zero_grad.
    "torch": {
        "autocast": False,
        "gradient_checkpointing": False,
        "loss": "full",
        "optimizer": "adamw_torch",
        "seq_len": 1024,
        "weight_dtype": {"full": "bf16", "lora": "bf16", "qlora": "bf16"},
        "kbit_prep": True,
        "adapter_dtype": "fp32",
    },
    # transformers 5.17 Trainer(bf16=True): training_args.py `optim` = adamw_torch_fused, `max_grad_norm` = 1.0,
    # `activation_checkpointing` off; accelerate wraps forward in autocast and casts outputs to fp32.
    "trainer": {
        "autocast": True,
        "gradient_checkpointing": False,
        "loss": "full",
        "optimizer": "adamw_torch_fused",
        "seq_len": 1024,
        "weight_dtype": {"full": "fp32", "lora": "bf16", "qlora": "bf16"},
        "kbit_prep": True,
        "adapter_dtype": "fp32",
    },
    # TRL 1.16 SFTTrainer: trainer/base_config.py `gradient_checkpointing` = True, `bf16` = True; trainer/sft_config.py
    # `max_length` = 1024, `loss_type` = "nll" (computed in chunks); trainer/sft_trainer.py casts the adapters of a
    # quantised model to bf16 and does not call prepare_model_for_kbit_training.
    "trl": {
        "autocast": True,
        "gradient_checkpointing": True,
        "loss": "chunked",
        "optimizer": "adamw_torch_fused",
        "seq_len": 1024,
        "weight_dtype": {"full": "fp32", "lora": "bf16", "qlora": "bf16"},
        "kbit_prep": False,
        "adapter_dtype": {"full": "fp32", "lora": "fp32", "qlora": "bf16"},
    },
}

LOSSES: dict[str, tuple[str, ...]] = {
    "torch": ("full", "chunked", "liger"),
    # transformers 5.17 trainer.py `compute_loss`: the model's own, which `use_liger_kernel` replaces.
    "trainer": ("full", "liger"),
    # TRL 1.16 trainer/sft_trainer.py `__init__`: add_fused_lm_head whatever `loss_type` says, and a ValueError for
    # Liger's `fused_linear_cross_entropy`. (Label smoothing and the deprecated `compute_loss_func` make full logits
    # in a forward of their own beside it, which is another run.)
    "trl": ("chunked",),
}
"""The losses that each stack computes in these versions; a run with another (an older TRL, a subclass) is warned of."""

ADAPTER_FIELDS = ("rank", "target_modules", "lora_dropout", "use_dora", "modules_to_save", "adapter_dtype")
QUANT_FIELDS = ("quant_type", "double_quant", "kbit_prep")
NO_USE_FOR: dict[str, tuple[str, ...]] = {
    "full": (*ADAPTER_FIELDS, *QUANT_FIELDS),
    "lora": QUANT_FIELDS,
    "qlora": (),
}
"""Fields that mean nothing to a method."""


class TrainConfig(BaseModel):
    """One fine-tuning run on one GPU.

    Raises:
        pydantic.ValidationError: a value out of range, an unknown field, or a field that the
            method has no use for (`rank` with `method="full"`): never silently ignored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "lora"
    """`full` trains every weight, `lora` adapters on a frozen base, `qlora` adapters on a 4-bit (or int8) base."""
    stack: Stack = "trl"
    """Whose defaults fill the fields left out: a plain PyTorch loop, transformers' Trainer, or TRL's SFTTrainer."""

    rank: int | None = Field(None, ge=1, le=65536)
    """LoRA rank (PEFT `r`); 16 unless told. None for `full`."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get an adapter (PEFT `target_modules`)."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, allow_inf_nan=False)
    """Dropout before the adapter (PEFT `lora_dropout`)."""
    use_dora: bool = False
    """Weight-decomposed adapters (PEFT `use_dora`)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapters (PEFT `modules_to_save`)."""
    adapter_dtype: FloatName = "fp32"
    """dtype of the adapters: PEFT makes them fp32 on a half-precision base; TRL casts those of a 4-bit base to bf16."""

    quant_type: QuantType = "nf4"
    """Storage of the frozen linear weights under `qlora` (bitsandbytes)."""
    double_quant: bool = True
    """Quantise the quantisation constants too (`bnb_4bit_use_double_quant`)."""
    kbit_prep: bool = True
    """PEFT's prepare_model_for_kbit_training: embeddings, norms and head of a quantised base in fp32."""

    micro_batch_size: int = Field(1, ge=1, le=2**20)
    """Sequences per forward pass (`per_device_train_batch_size`)."""
    seq_len: int = Field(1024, ge=1, le=2**24)
    """Tokens per sequence (TRL `max_length`)."""
    gradient_accumulation_steps: int = Field(1, ge=1, le=2**16)
    """Forward/backward passes per optimizer step."""
    padding: bool = False
    """The batch holds sequences of unequal length, so attention gets a real padding mask."""

    gradient_checkpointing: bool = False
    """Keep only each layer's input and recompute the rest in backward."""
    reentrant: bool = False
    """The reentrant variant of checkpointing (`use_reentrant`)."""
    attention: Attention = "sdpa"
    """Attention kernel (`attn_implementation`)."""
    weight_dtype: FloatName = "bf16"
    """dtype the model is loaded in (`dtype`)."""
    autocast: bool = False
    """Run forward under bf16 autocast (`bf16=True`)."""
    optimizer: str = "adamw_torch"
    """Optimizer by its Hugging Face `optim` string."""
    loss: Loss = "full"
    """Full logits, TRL's chunks, or Liger's fused linear cross-entropy; not every stack computes each (`LOSSES`)."""
    max_grad_norm: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    """Gradients are clipped to this norm; 0 turns clipping off."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_stack(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        method, stack = data.get("method", "lora"), data.get("stack", "trl")
        if not isinstance(method, str) or not isinstance(stack, str):
            return data  # to be refused where the fields are checked
        filled = dict(data)
        for name, value in PRESETS.get(stack, {}).items():
            filled.setdefault(name, value.get(method) if isinstance(value, dict) else value)
        if method in ("lora", "qlora") and filled.get("rank") is None:
            filled["rank"] = 16
        for name in NO_USE_FOR.get(method, ()):
            default = cls.model_fields[name].default
            if name in data and data[name] not in (None, default):
                needs = "qlora" if name in QUANT_FIELDS else "lora` or `qlora"
                raise MemplanError(
                    f"`{name}` has no meaning with method `{method}`", hints=[f"leave it out, or take method `{needs}`"]
                )
            filled[name] = default
        return filled

    @model_validator(mode="wrap")
    @classmethod
    def _remember_what_was_said(cls, data: Any, handler: Any) -> Self:
        said = frozenset(data) if isinstance(data, dict) else None
        config: Self = handler(data)
        if said is not None:
            config.__pydantic_fields_set__.intersection_update(said)
        return config

    @field_validator("target_modules", "modules_to_save", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            return tuple([part.strip() for part in value.split(",") if part.strip()])
        return value

    @field_validator("target_modules", "modules_to_save")
    @classmethod
    def _no_empty_name(cls, value: str | tuple[str, ...], info: ValidationInfo) -> str | tuple[str, ...]:
        if info.field_name == "target_modules" and not value:
            raise MemplanError("name at least one module, or `all-linear`", hints=["such as `q_proj,v_proj`"])
        if not isinstance(value, str) and "" in value:
            raise MemplanError("an empty name", hints=["write names such as `q_proj` or `lm_head`"])
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.autocast and self.weight_dtype == "fp16":
            raise MemplanError(
                "`autocast` is bf16 here, and fp16 weights under bf16 autocast are not a run anybody makes",
                hints=["turn `autocast` off, or load the weights in bf16"],
            )
        if self.reentrant and not self.gradient_checkpointing:
            raise MemplanError(
                "`reentrant` has no meaning without `gradient_checkpointing`",
                hints=["turn `gradient_checkpointing` on, or leave `reentrant` out"],
            )
        if self.quant_type == "int8" and "double_quant" in self.model_fields_set and self.double_quant:
            raise MemplanError("`double_quant` is of 4-bit storage; int8 has none", hints=["leave `double_quant` out"])
        return self

    def but(self, **changes: Any) -> Self:
        """The same run with some fields changed; what the user left out is filled anew from the stack."""
        said = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**said, **changes})

    @property
    def trains_adapters(self) -> bool:
        return self.method != "full"

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.micro_batch_size * self.seq_len
