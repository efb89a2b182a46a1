"""What every decoder has: embedding, a stack of layers, a final norm and a head; and what the layers share.

A family is a `Decoder` subclass: it says how its pieces are built and run, in the words of its
transformers module. Everything about methods, dtypes, checkpointing and optimizers is elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from memplan.architectures.builder import Builder
from memplan.architectures.run_warnings import run_warnings
from memplan.architectures.shared import Shared, rotary_table
from memplan.dtypes import DType
from memplan.errors import UnknownNameError
from memplan.model_spec import ModelSpec
from memplan.ops.activations import ACTIVATIONS
from memplan.ops.attention import eager, sdpa, split_heads
from memplan.ops.device import HOPPER, Device
from memplan.ops.rotary import apply_partial_rotary, apply_rotary
from memplan.ops.tensor import Machine, Tensor
from memplan.train_config import TrainConfig

Layer = Callable[[Tensor], Tensor | tuple[Tensor, Tensor | None]]
"""Hidden states to hidden states; beside them what the layer returns and the model holds until the next one has
returned (`outputs = block(...)`)."""
Norm = Callable[[Tensor], Tensor]
Mlp = Callable[[Tensor], Tensor]
Attention = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Decoder(ABC):
    """One model for one run. `spec` and `config` say all; a builder says on which machine."""

    layer_prefix = "model.layers"
    embedding_name = "model.embed_tokens"
    rotary_name = "model.rotary_emb"
    registered_late: tuple[str, ...] = ()
    """Beginnings of the names of what is registered behind the final norm: of the embedding's, then of the head's."""
    softmax_in_fp32 = True
    """Eager attention's softmax runs in fp32 whatever the dtype of the scores."""
    casts_probabilities = True
    """Where it does not, its result is cast to the dtype of the values (autocast's softmax is in fp32)."""
    passes_mask_by_position = False
    """Layers get the mask as a positional argument: a reentrant checkpoint saves it, and holds the others by name."""
    supports_sdpa = True
    """Off, transformers takes eager attention whatever is asked."""
    looks_up_positions = False
    """Positions are rows of a table (learned, sines, ALiBi): there are none beyond `max_position_embeddings`."""
    sliding_layers_have_own_rotary = False
    """Sliding layers rotate by tables of their own (gemma3)."""

    def __init__(self, spec: ModelSpec, config: TrainConfig, device: Device = HOPPER) -> None:
        self.spec = spec
        self.config = config
        self.device = device

    @property
    def most_tokens(self) -> int | None:
        """The longest sequence that the model can run at all; None for no end."""
        return self.spec.max_position_embeddings if self.looks_up_positions else None

    # What a family may change

    def layer_kind(self, index: int) -> str:
        """Layers of the same kind take the same memory; the kind is passed to `layer`."""
        return self.spec.layer_types[index] if self.spec.layer_types else "full_attention"

    def attention_windows(self) -> dict[str, int | None]:
        """The masks that the model makes once a step, and the window of each: `full_attention`, `sliding_attention`,
        `chunked_attention`."""
        windows: dict[str, int | None] = {"full_attention": None}
        if self.spec.sliding_layers:
            windows["sliding_attention"] = self.spec.sliding_window
        return windows

    def reads(self, index: int) -> tuple[str, ...]:
        """Names of what layer `index` is given beside the hidden states that an earlier piece made for it: an embedding
        for each layer, keys and values of another layer."""
        return ()

    def gives(self, index: int) -> tuple[str, ...]:
        """Names of what layer `index` leaves for later ones beside the hidden states."""
        return ()

    def before_layer(self, build: Builder) -> tuple[str, ...]:
        """What the model's loop makes of `build.carried` before it calls a layer; the names there of what it then
        passes by position, which a checkpoint saves as its inputs."""
        return ()

    def rotary_table(self, machine: Machine, width: int, dtype: DType) -> tuple[Tensor, Tensor | None]:
        """cos and sin of `width`, as layers are given them; or one table of complex numbers."""
        return rotary_table(machine, self.config.seq_len, width, dtype)

    def make_other_masks(self, machine: Machine) -> None:  # noqa: B027  most models make none
        """What the model allocates for masks beside those of attention, and lets go of."""

    def shared_of(self, kind: str, shared: Shared) -> Shared:
        """What a layer of `kind` is given of the shared tensors."""
        return shared.sliding() if kind.startswith(("sliding", "chunked")) else shared.full()

    def embed(self, build: Builder) -> Tensor:
        """What the model makes of the token ids before masks and rotary tables, [B, S, hidden].

        `build.holds(...)` says what the model's forward keeps in a local beside what the first layer gets.
        """
        return self.embed_tokens(build)

    def enter(self, build: Builder, hidden_states: Tensor) -> Tensor:
        """What happens to the embeddings after masks and tables are made: dropout."""
        return hidden_states

    def make_shared(self, machine: Machine, dtype: DType, position_ids: Tensor | None = None) -> Shared:
        """What the model computes once for all layers, in its order, beside `position_ids` it has already."""
        return Shared.computed(self, machine, dtype, position_ids)

    @abstractmethod
    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        """One layer of `kind`, with its weights made by `build`."""

    def final_norm(self, build: Builder) -> Norm:
        return build.rms_norm("model.norm", self.spec.hidden_size)

    def after_head(self, logits: Tensor) -> Tensor:
        """What the model does to the logits (scaling, soft caps)."""
        return logits

    def buffers(self, build: Builder) -> None:
        """Tensors on the device that are no parameters: rotary frequencies and the copy kept of them."""
        for kind in self.rotary_kinds if self.sliding_layers_have_own_rotary else [""]:
            width = self.rotary_dim_of(kind)
            if width is None:
                return
            prefix = f"{self.rotary_name}.{kind}_" if kind else f"{self.rotary_name}."
            build.buffer(f"{prefix}inv_freq", (width // 2,), DType.fp32)
            build.buffer(f"{prefix}original_inv_freq", (width // 2,), DType.fp32)

    def rotary_dim(self) -> int | None:
        """Width of the rotary tables; None for a model without."""
        return self.spec.rotary_dim or self.spec.head_dim

    def rotary_dim_of(self, kind: str) -> int | None:
        """The same for the tables of one kind of attention, where each has its own."""
        return self.rotary_dim()

    def warnings(self) -> list[str]:
        """What the user should know of this model and run, one sentence each."""
        return run_warnings(self.spec, self.config, self.attention_implementation)

    # What all share

    @property
    def rotary_kinds(self) -> list[str]:
        """The kinds of attention that have rotary tables, where each has its own."""
        return sorted(set(self.spec.layer_types)) or ["full_attention"]

    @property
    def tied_name(self) -> str:
        """The weight that is both embedding and output head; empty for none."""
        return f"{self.embedding_name}.weight" if self.spec.tie_word_embeddings else ""

    @property
    def batch(self) -> tuple[int, int]:
        return self.config.micro_batch_size, self.config.seq_len

    @property
    def attention_implementation(self) -> str:
        """What runs: `config.attention` where the family has it."""
        return self.config.attention if self.supports_sdpa else "eager"

    @property
    def gets_mask(self) -> bool:
        """Whether the model gets an attention_mask; SFTTrainer's collator always makes one."""
        return self.config.padding or self.config.stack == "trl"

    @property
    def embedding_dtype(self) -> DType:
        """dtype of the token embeddings: that of the unquantised weights (see `Builder.frozen_dtype`)."""
        prepared = self.config.method == "qlora" and self.config.kbit_prep
        return DType.fp32 if prepared else DType[self.config.weight_dtype]

    @property
    def embedding_width(self) -> int:
        return self.spec.word_embed_proj_dim or self.spec.hidden_size

    @property
    def leaf_embeddings(self) -> bool:
        """Whether the embeddings are made to require a gradient, so that checkpoints of a frozen base have one to pass
        on (`enable_input_require_grads`, transformers modeling_utils.py)."""
        return self.config.trains_adapters and self.config.gradient_checkpointing

    def embed_tokens(self, build: Builder, width: int | None = None) -> Tensor:
        embed = build.embedding(self.embedding_name, self.spec.vocab_size, width or self.spec.hidden_size)
        return self.as_leaf(embed(self.batch))

    def as_leaf(self, embeddings: Tensor) -> Tensor:
        """The embeddings, made to require a gradient where the run does so."""
        if self.leaf_embeddings:
            embeddings.is_leaf = embeddings.node is None
            embeddings.requires_grad = True
        return embeddings

    def head(self, build: Builder) -> Callable[[Tensor], Tensor]:
        spec = self.spec
        if spec.tie_word_embeddings:
            width, bias = self.embedding_width, spec.lm_head_bias
            return build.tied_head("lm_head", self.embedding_name, width, spec.vocab_size, bias=bias)
        return build.linear("lm_head", self.embedding_width, spec.vocab_size, bias=spec.lm_head_bias, quantise=False)

    @property
    def soft_caps_scores(self) -> bool:
        """Whether eager attention caps its scores by tanh before the mask is added."""
        return False

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, shared: Shared, *, p: float | None = None, by_heads: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The attention function that the run asks for: [B, S, N, H], and eager's probabilities.

        `by_heads`: q and k lie [B, N, S, H] in memory, as the concatenation of a partial rotation leaves them.
        """
        groups = q.shape[1] // k.shape[1]
        p = self.spec.attention_dropout if p is None else p
        if self.attention_implementation == "eager":
            return eager(
                q,
                k,
                v,
                mask=shared.mask,
                num_groups=groups,
                p=p,
                softmax_in_fp32=self.softmax_in_fp32,
                casts_probabilities=self.casts_probabilities,
                by_heads=by_heads,
                soft_caps=self.soft_caps_scores,
            )
        return sdpa(q, k, v, mask=shared.mask, num_groups=groups, p=p, by_heads=by_heads)

    def heads(self, x: Tensor, num_heads: int, shared: Shared | None = None, *, rotated: bool = False) -> Tensor:
        """A projection seen by heads; see `split_heads` for when its gradient is copied: after a rotation, eager
        products, sdpa by products, and the sum over the heads that a key or value was repeated for.

        `shared` is what the layer is given, where masks differ by layer.
        """
        copies = rotated or self.gradient_comes_by_heads(x, num_heads, shared)
        return split_heads(x, num_heads, x.shape[-1] // num_heads, copies=copies)

    def gradient_comes_by_heads(self, x: Tensor, num_heads: int, shared: Shared | None = None) -> bool:
        """Whether attention leaves the gradient of projections like `x` laid out by heads."""
        masked = self.config.padding if shared is None else shared.mask is not None
        repeated = masked and num_heads < self.spec.num_attention_heads
        return repeated or self.attention_implementation == "eager" or self.attends_by_ops(x, masked)

    def attends_by_ops(self, x: Tensor, masked: bool) -> bool:
        """Whether sdpa has no fused kernel for projections like `x`: fp32 with grouped heads and no mask."""
        spec, config = self.spec, self.config
        grouped = spec.num_attention_heads != spec.num_key_value_heads
        fp32 = x.dtype is DType.fp32 and not config.autocast
        return grouped and fp32 and self.attention_implementation == "sdpa" and not masked

    def rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        assert shared.cos is not None and shared.sin is not None
        width = shared.cos.shape[-1]
        if width == q.shape[-1]:
            return apply_rotary(q, k, shared.cos, shared.sin)
        return (
            apply_partial_rotary(q, shared.cos, shared.sin, width),
            apply_partial_rotary(k, shared.cos, shared.sin, width),
        )

    def activation(self, name: str | None = None) -> Callable[[Tensor], Tensor]:
        name = name or self.spec.hidden_act
        if name not in ACTIVATIONS:
            raise UnknownNameError("activation", name, ACTIVATIONS)
        return ACTIVATIONS[name]

    def dtype_of_token_embeddings(self, hidden: DType) -> DType:
        """What masks are made in: `hidden`, unless a copy of the embedding is trained in another dtype and something
        wider (positions) is added to what it gives."""
        config = self.config
        saved = config.trains_adapters and any(self.embedding_name.endswith(m) for m in config.modules_to_save)
        return DType[config.adapter_dtype] if saved and config.adapter_dtype != "fp32" else hidden

    def shared_dtype(self, hidden: DType) -> DType:
        """dtype of the rotary tables: that of the hidden states."""
        return hidden
