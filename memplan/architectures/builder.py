"""Makes the layers of a model as the run has them: plain, quantised, with an adapter, frozen or trained.

A family says `build.linear("self_attn.q_proj", h, d)`; the builder decides what stands there and keeps the list of
weights, in the order in which the model registers them, for loading, the optimizer and the counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from memplan.architectures.int8_outliers import outlier_columns
from memplan.architectures.peft_targets import adapts_module, parameter_rank
from memplan.dtypes import DType
from memplan.errors import MemplanError
from memplan.model_spec import ModelSpec
from memplan.ops.dora import DoraEmbedding, DoraLinear
from memplan.ops.embedding import Embedding
from memplan.ops.int8 import Linear8bitLt, storage_bytes_int8
from memplan.ops.linear import Linear
from memplan.ops.lora import BaseLinear, LoraEmbedding, LoraLinear
from memplan.ops.lora_parameter import BareParameter
from memplan.ops.norm import LayerNorm, OffsetRMSNorm, RMSNorm
from memplan.ops.quantized import Linear4bit, storage_bytes_4bit
from memplan.ops.tensor import EXTERNAL, Machine, Parameter, Shape, Storage, Tensor, round_block
from memplan.train_config import TrainConfig

MAGNITUDE = "lora_magnitude_vector.weight"


class Weight(NamedTuple):
    """One weight as it lies on the device."""

    name: str
    shape: Shape
    dtype: DType
    trains: bool
    kind: str
    """`weights` or `adapters`."""
    stored: tuple[int, ...] = ()
    """Bytes of each tensor of a quantised weight; empty for a plain one."""
    loaded_dtype: DType | None = None
    """dtype in which it is loaded, or an adapter made, if it is cast afterwards."""
    prepared_dtype: DType | None = None
    """dtype in which loading and prepare_model_for_kbit_training leave it, where the first forward may cast it."""
    buffer: bool = False
    """Not a parameter (rotary frequencies)."""
    of: str = ""
    """Class of the module it belongs to, where Trainer makes a difference: "LayerNorm", "Embedding"."""
    gets_gradient: bool = True
    """Off for what trains in name only, as the model's forward goes past it."""

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def learns(self) -> bool:
        """Whether it has a gradient, and with it states of the optimizer."""
        return self.trains and self.gets_gradient

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device, in whole blocks."""
        if self.stored:
            return sum(round_block(n) for n in self.stored)
        return round_block(self.numel * self.dtype.itemsize)


AnyLinear = Linear | Linear4bit | Linear8bitLt | LoraLinear | DoraLinear
"""A linear layer as some run has it."""


@dataclass
class Builder:
    """Builds on one machine for one model and one run."""

    spec: ModelSpec
    config: TrainConfig
    machine: Machine
    weights: list[Weight] = field(default_factory=list)
    parameters: list[Parameter] = field(default_factory=list)
    held: list[Tensor] | None = None
    """Locals of the model's forward that live until it returns; None for the first layer's input alone."""
    carried: dict[str, Tensor] = field(default_factory=dict)
    """What the layer being built gets beside the hidden states (`Decoder.reads`); of the embedding, what it gives."""
    gives: tuple[str, ...] = ()
    """Names of what the layer being built is to leave for later ones (`Decoder.gives`)."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """Where its forward leaves that."""
    rebound: dict[str, list[Tensor]] = field(default_factory=dict)
    """Further locals of the model's forward, in the order in which it rebinds them behind the layers."""
    rebinds: dict[str, int] = field(default_factory=dict)
    """Where on the head's forward tape it does so."""
    position_ids: Tensor | None = None
    """Positions that the embedding needed before the layers do."""
    input_variance: float = 1.0
    """Variance of the hidden states that the block being built reads: 1 behind a norm."""
    gate_sparsity: float = 0.0
    """Share of the gates of the MLP being built that is cut to zero before the activation."""

    @property
    def dtype(self) -> DType:
        return DType[self.config.weight_dtype]

    @property
    def frozen_dtype(self) -> DType:
        """dtype of what stays unquantised: fp32 after prepare_model_for_kbit_training (peft/utils/other.py)."""
        return DType.fp32 if self.config.method == "qlora" and self.config.kbit_prep else self.dtype

    def is_target(self, name: str) -> bool:
        """Whether PEFT puts an adapter on the layer `name` (tuners/tuners_utils.py `check_target_module_exists`)."""
        if not self.config.trains_adapters:
            return False
        return adapts_module(self.spec.model_type, self.config.target_modules, name)

    def saves(self, module: str) -> bool:
        """Whether PEFT trains a copy of the whole module (`modules_to_save`; utils/other.py `_set_trainable`)."""
        return self.config.trains_adapters and any(module.endswith(m) for m in self.config.modules_to_save)

    def parameter(
        self,
        name: str,
        shape: Shape,
        *,
        kind: str = "weights",
        dtype: DType | None = None,
        loaded: DType | None = None,
        gets_gradient: bool = True,
        of: str = "",
    ) -> Parameter:
        """A weight that is not quantised; `loaded` is the dtype it is made in, `of` its module's class."""
        trains = kind == "adapters" or self.config.method == "full"
        dtype = dtype or self.frozen_dtype
        if kind == "weights" and dtype is not self.dtype:
            loaded = self.dtype
        weight = Weight(name, shape, dtype, trains, kind, loaded_dtype=loaded, gets_gradient=gets_gradient, of=of)
        self.weights.append(weight)
        made = Parameter(self.machine, name, shape, dtype, trains=trains)
        if trains:
            self.parameters.append(made)
        return made

    def own(self, module: str, *leaves: tuple[str, Shape], of: str = "") -> list[Parameter]:
        """The parameters (leaf and shape) of a module that may be trained whole: its copy's, if it has one."""
        made = [self.parameter(f"{module}.{leaf}", shape, of=of) for leaf, shape in leaves]
        return [self._copy(p, module, of) for p in made] if self.saves(module) else made

    def _copy(self, original: Parameter, module: str, of: str = "") -> Parameter:
        """PEFT casts adapters to fp32, these copies not; `adapter_dtype` then holds for all that trains."""
        leaf, wanted = original.name.rpartition(".")[2], self.config.adapter_dtype
        dtype = original.dtype if wanted == "fp32" else DType[wanted]
        name = f"{module}.modules_to_save.{leaf}"
        return self.parameter(name, original.shape, kind="adapters", dtype=dtype, loaded=original.dtype, of=of)

    def embedding(
        self, name: str, num_rows: int, width: int, embed_scale: Tensor | None = None, *, is_input: bool = True
    ) -> Embedding | LoraEmbedding | DoraEmbedding:
        """nn.Embedding as the run has it; `embed_scale` multiplies its rows (Gemma). `is_input`: it is what
        `get_input_embeddings` returns, which checkpoints of a frozen base have a hook on."""
        (weight,) = self.own(name, ("weight", (num_rows, width)), of="Embedding")
        if embed_scale is not None and self.saves(name):
            copy = f"{name}.modules_to_save.embed_scale"
            self.weights.append(Weight(copy, (), embed_scale.dtype, False, "adapters", buffer=True))
        base = Embedding(weight, embed_scale)
        if self.config.target_modules == "all-linear" or not self.is_target(name) or self.saves(name):
            return base
        assert self.config.rank is not None
        made = weight.dtype
        # TRL puts the hook on the adapted embedding, the others on the base before it is adapted.
        base.makes_leaf = is_input and self.config.gradient_checkpointing and self.config.stack != "trl"
        down = self._adapter(f"{name}.lora_embedding_A", (self.config.rank, num_rows), made)
        up = self._adapter(f"{name}.lora_embedding_B", (width, self.config.rank), made)
        if self.config.use_dora:
            return DoraEmbedding(base, down, up, self._adapter(f"{name}.{MAGNITUDE}", (width,), made))
        return LoraEmbedding(base, down, up)

    def tied_head(
        self, name: str, tied_to: str, width: int, vocab: int, *, bias: bool = False
    ) -> Linear | LoraLinear | DoraLinear:
        """An output head whose weight is that of the embedding `tied_to`; its bias is its own (gptj, phi)."""
        weight = self.tied(f"{tied_to}.weight", (vocab, width))
        own = self.own(name, ("bias", (vocab,))) if bias else []
        if self.saves(name):
            return Linear(width, vocab, self._copy(weight, name), *own)
        base = Linear(width, vocab, weight, *own)
        return self._adapted(name, base, width, vocab) if self.is_target(name) else base

    def tied(self, name: str, shape: Shape) -> Parameter:
        """A weight once more (the token embedding as the output head): the same tensor, so not loaded again."""
        made = Parameter(self.machine, name, shape, self.frozen_dtype, trains=self.config.method == "full")
        if made.requires_grad:
            self.parameters.append(made)
        return made

    def rebind(self, name: str) -> None:
        """Says that the model's forward lets go here of what the local `name` was before the layers."""
        tape = self.machine.tape
        self.rebinds[name] = 0 if tape is None else len(tape)

    def holds(self, *tensors: Tensor) -> None:
        """Says which of the embedding's tensors the model's forward has in a local until it returns."""
        self.held = list(tensors)

    def linear(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        quantise: bool = True,
        transposed: bool = False,
        kind: type[Linear] = Linear,
    ) -> AnyLinear:
        """nn.Linear, or transformers' Conv1D (`transposed`: weight [in, out]), as the run has it.

        Raises:
            MemplanError: a quantised layer among `modules_to_save`.
        """
        base: BaseLinear
        if self.config.method == "qlora" and quantise:
            base = self._quantised(name, in_features, out_features, bias)
        else:
            shape = (in_features, out_features) if transposed else (out_features, in_features)
            leaves = [("weight", shape), *([("bias", (out_features,))] if bias else [])]
            base = kind(in_features, out_features, *self.own(name, *leaves))
        if not self.is_target(name) or self.saves(name):
            return base
        return self._adapted(name, base, in_features, out_features)

    def bypassed_linear(self, name: str, in_features: int, out_features: int) -> Parameter:
        """The weight of an nn.Linear that the model reads itself: an adapter around it trains in name only."""
        begin = len(self.weights)
        layer = self.linear(name, in_features, out_features, quantise=False)
        if isinstance(layer, Linear):
            return layer.weight
        assert isinstance(layer, LoraLinear | DoraLinear)
        assert isinstance(layer.base, Linear)
        self.weights[begin:] = [w._replace(gets_gradient=w.kind == "weights") for w in self.weights[begin:]]
        return layer.base.weight

    def _quantised(self, name: str, in_features: int, out_features: int, bias: bool) -> Linear4bit | Linear8bitLt:
        if self.saves(name):
            raise MemplanError(
                f"`{name}` is quantised, so that it cannot be trained whole",
                hints=["leave it out of `modules_to_save`, or use `method=lora`"],
            )
        config = self.config
        if config.quant_type == "int8":
            stored = storage_bytes_int8(out_features, in_features)
        else:
            stored = storage_bytes_4bit(in_features * out_features, double_quant=config.double_quant)
        shape = out_features, in_features
        self.weights.append(Weight(f"{name}.weight", shape, self.dtype, False, "weights", tuple(stored)))
        if config.quant_type == "int8":
            plain = self.parameter(f"{name}.bias", (out_features,)) if bias else None
            num_outliers = outlier_columns(
                self.spec, config, name, in_features, self.input_variance, self.gate_sparsity
            )
            return Linear8bitLt(in_features, out_features, plain, num_outliers)
        kept = self._bias_4bit(name, out_features) if bias else None
        return Linear4bit(in_features, out_features, config.double_quant, self.compute_dtype, kept, self.dtype)

    @property
    def compute_dtype(self) -> DType:
        """dtype of products with 4-bit weights (`bnb_4bit_compute_dtype`): the model's, bf16 for an fp32 model."""
        return self.dtype if self.dtype.is_half else DType.bf16

    def _bias_4bit(self, name: str, width: int) -> Parameter:
        """prepare_model_for_kbit_training casts it to fp32, the layer's first forward casts it back for good
        (bitsandbytes 0.50.2 nn/modules.py `Linear4bit.forward`: `bias.data = bias.data.to(x.dtype)`)."""
        dtype = self.compute_dtype
        prepared = DType.fp32 if self.config.kbit_prep else self.dtype
        self.weights.append(
            Weight(f"{name}.bias", (width,), dtype, False, "weights", loaded_dtype=self.dtype, prepared_dtype=prepared)
        )
        return Parameter(self.machine, f"{name}.bias", (width,), dtype, trains=False)

    def _adapted(self, name: str, base: BaseLinear, in_features: int, out_features: int) -> LoraLinear | DoraLinear:
        rank, dropout = self.config.rank, self.config.lora_dropout
        assert rank is not None
        if isinstance(base, Linear):
            made = base.weight.dtype
        else:
            made = base.compute_dtype if isinstance(base, Linear4bit) else DType.fp32
        down = self._adapter(f"{name}.lora_A.weight", (rank, in_features), made)
        up = self._adapter(f"{name}.lora_B.weight", (out_features, rank), made)
        lora_a, lora_b = Linear(in_features, rank, down), Linear(rank, out_features, up)
        if not self.config.use_dora:
            return LoraLinear(base, lora_a, lora_b, dropout)
        magnitude = self._adapter(f"{name}.{MAGNITUDE}", (out_features,), made)
        return DoraLinear(base, lora_a, lora_b, magnitude, dropout)

    def _adapter(self, name: str, shape: Shape, made: DType) -> Parameter:
        """TRL 1.16 leaves DoRA's magnitudes in fp32 where it casts a quantised model's adapters (sft_trainer.py)."""
        config = self.config
        stays = name.endswith(MAGNITUDE) and config.stack == "trl" and config.method == "qlora"
        dtype = DType.fp32 if stays else DType[config.adapter_dtype]
        return self.parameter(name, shape, kind="adapters", dtype=dtype, loaded=made)

    def adapt(self, *parameters: BareParameter) -> None:
        """Puts adapters around a module's bare parameters that PEFT targets (tuners/lora/layer.py `ParamWrapper`).

        Raises:
            MemplanError: dropout or DoRA, which such adapters do not take.
        """
        for bare in parameters if self.config.trains_adapters else ():
            weight, config = bare.weight, self.config
            assert config.rank is not None
            rank = parameter_rank(self.spec.model_type, config.target_modules, weight.name, config.rank)
            if not rank:
                continue
            if config.lora_dropout or config.use_dora:
                asked = "use_dora" if config.use_dora else "lora_dropout"
                raise MemplanError(
                    f"PEFT's adapter of the parameter `{weight.name}` takes no `{asked}`",
                    hints=["leave it out, or name only attention projections in `target_modules`"],
                )
            num_experts = weight.shape[0] if len(weight.shape) == 3 else 1
            dtype, (out_features, in_features) = DType[config.adapter_dtype], weight.shape[-2:]
            down, up = (num_experts * rank, in_features), (out_features, num_experts * rank)
            bare.lora_A = self.parameter(f"{weight.name}.lora_A.weight", down, kind="adapters", dtype=dtype)
            bare.lora_B = self.parameter(f"{weight.name}.lora_B.weight", up, kind="adapters", dtype=dtype)

    def rms_norm(self, name: str, width: int) -> RMSNorm:
        return RMSNorm(*self.own(name, ("weight", (width,))))

    def offset_rms_norm(self, name: str, width: int) -> OffsetRMSNorm:
        return OffsetRMSNorm(*self.own(name, ("weight", (width,))))

    def layer_norm(
        self, name: str, width: int, *, bias: bool = True, affine: bool = True, strided: bool = False
    ) -> LayerNorm:
        leaves = [("weight", (width,)), *([("bias", (width,))] if bias else [])] if affine else []
        made = self.own(name, *leaves, of="LayerNorm")
        weight, made_bias = (*made, None, None)[:2]
        return LayerNorm(weight, made_bias, strided)

    def buffer(self, name: str, shape: Shape, dtype: DType) -> Tensor:
        """A tensor that the model keeps on the device and that is no parameter."""
        self.weights.append(Weight(name, shape, dtype, False, "weights", buffer=True))
        return Tensor(Storage(self.machine, prod(shape) * dtype.itemsize, slot=EXTERNAL), shape, dtype)
