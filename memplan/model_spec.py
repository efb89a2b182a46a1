"""ModelSpec: one architecture, in the names of a Hugging Face `config.json`.

Every family is told in one spelling, the one `LlamaConfig` has; `hf_config` translates the others.
A spec says what the transformers model of that `model_type` builds, so a bias that no key of the
config mentions (qwen2's q/k/v) is stated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from memplan.errors import InvalidSpecError
from memplan.hf_config import canonical_fields, read_config
from memplan.hf_rules import MAX_LAYERS

LayerType = Literal["full_attention", "sliding_attention", "chunked_attention", "linear_attention"]

_LEARNED_POSITIONS = frozenset({"gpt2", "gptj", "mpt", "opt"})
"""Model types that keep a table of `max_position_embeddings` rows (of sines in gptj, of biases in mpt)."""
_SPARSE = frozenset({"mixtral", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe"})
"""Model types whose layers have experts whatever their number; the qwen ones are dense without."""

_LINEAR = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
)  # fmt: skip
_GEMMA3N = ("hidden_size_per_layer_input", "altup_num_inputs", "laurel_rank", "activation_sparsity_pattern")
# Bounds keep a typing mistake (or a hostile file) from becoming an estimate of petabytes or a loop of
# hours; each lies at least eightfold above the largest model published.
MAX_WIDTH = 2**20
MAX_VOCAB = 2**24
MAX_POSITIONS = 2**31


class ModelSpec(BaseModel):
    """One decoder-only language model.

    Raises:
        pydantic.ValidationError: a field of the wrong type or out of bounds, or fields that contradict
            each other. `from_hf_config` turns these into `InvalidSpecError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())

    model_type: str = Field(max_length=64)
    """Family, as transformers spells it; it decides gating, norms and biases."""
    hidden_size: int = Field(ge=1, le=MAX_WIDTH)
    """Width of the residual stream."""
    intermediate_size: int = Field(ge=1, le=MAX_WIDTH)
    """Width of the dense MLP (of one expert in mixtral, gpt_oss and olmoe)."""
    num_hidden_layers: int = Field(ge=1, le=MAX_LAYERS)
    """Decoder layers."""
    num_attention_heads: int = Field(ge=1, le=MAX_WIDTH)
    """Query heads."""
    num_key_value_heads: int = Field(ge=1, le=MAX_WIDTH)
    """Key and value heads; 1 is multi-query attention."""
    head_dim: int = Field(ge=1, le=MAX_WIDTH)
    """Width of one head; with multi-head latent attention the rotary part, as transformers has it."""
    vocab_size: int = Field(ge=1, le=MAX_VOCAB)
    """Rows of the token embedding, padding included."""
    max_position_embeddings: int | None = Field(None, ge=1, le=MAX_POSITIONS)
    """Longest sequence the model was made for; None where the family has no limit (bloom)."""
    tie_word_embeddings: bool = False
    """The output head is the token embedding."""

    hidden_act: str = Field("silu", max_length=64)
    """Activation of the MLP, as transformers' ACT2FN names it."""
    attention_bias: bool = False
    """q, k and v (and latent down-projections) have a bias."""
    attention_out_bias: bool = False
    """The attention output projection has a bias."""
    mlp_bias: bool = False
    """MLP projections have a bias."""
    lm_head_bias: bool = False
    """The output head has a bias."""
    qk_norm: bool = False
    """Queries and keys are normalised before attention."""
    norm_affine: bool = True
    """Norms have weights (opt `layer_norm_elementwise_affine`; olmo has none)."""
    initializer_range: float = Field(0.02, ge=0.0, le=10.0)
    """Standard deviation of fresh weights, from which the outliers of an int8 base are counted; nothing else."""
    final_norm: bool = True
    """A norm follows the last layer (opt-350m has none)."""

    attention_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout of the attention probabilities in training."""
    hidden_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on what attention and MLP add to the residual."""
    embedding_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout after the embedding."""

    sliding_window: int | None = Field(None, ge=1, le=MAX_POSITIONS)
    """Window of the sliding layers, in tokens; None when no layer slides."""
    layer_types: tuple[LayerType, ...] = Field((), max_length=MAX_LAYERS)
    """Attention of each layer; empty when all are full."""
    attention_chunk_size: int | None = Field(None, ge=1, le=MAX_POSITIONS)
    """llama4: tokens of a chunk, within which layers of chunked attention attend."""
    attn_temperature_tuning: bool = False
    """llama4: layers that do not rotate scale their queries by position."""
    linear_num_key_heads: int = Field(0, ge=0, le=MAX_WIDTH)
    """qwen3_next: heads of queries and keys in layers with linear attention."""
    linear_num_value_heads: int = Field(0, ge=0, le=MAX_WIDTH)
    """Heads of values there, a multiple of those of keys."""
    linear_key_head_dim: int = Field(0, ge=0, le=MAX_WIDTH)
    """Width of a query or key head there."""
    linear_value_head_dim: int = Field(0, ge=0, le=MAX_WIDTH)
    """Width of a value head there."""
    linear_conv_kernel_dim: int = Field(0, ge=0, le=MAX_WIDTH)
    """Tokens that the short convolution before them sees."""
    rotary_dim: int | None = Field(None, ge=0, le=MAX_WIDTH)
    """Leading elements of each head that are rotated; None is the whole head."""
    no_rope_layers: tuple[int, ...] = Field((), max_length=MAX_LAYERS)
    """Flags of smollm3, exaone4 and llama4, one a layer: 1 rotates, 0 does not. Empty when all rotate."""
    alibi: bool = False
    """Attention biases by distance in place of rotary positions."""
    attn_logit_softcapping: float | None = None
    """tanh cap on attention scores (gemma2)."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this in place (olmo, olmoe)."""
    final_logit_softcapping: float | None = None
    """tanh cap on the logits (gemma2)."""

    parallel_residual: bool = False
    """Attention and MLP read the same input and add to the residual together."""
    num_ln_in_parallel_attn: int = Field(1, ge=1, le=2)
    """Norms before a parallel block (falcon)."""
    new_decoder_architecture: bool = False
    """falcon's grouped-query layout (40B and later)."""
    multi_query: bool = False
    """falcon's single key/value head (7B)."""
    do_layer_norm_before: bool = True
    """Norms come before attention and MLP; after them in opt-350m."""
    word_embed_proj_dim: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """opt: width of the embedding, projected to `hidden_size` when it differs."""

    num_experts: int = Field(0, ge=0, le=2**14)
    """Routed experts per MoE layer; 0 for a dense model."""
    num_experts_per_tok: int = Field(0, ge=0, le=2**14)
    """Routed experts that one token visits."""
    moe_intermediate_size: int = Field(0, ge=0, le=MAX_WIDTH)
    """Width of one routed expert."""
    num_shared_experts: int = Field(0, ge=0, le=2**10)
    """deepseek: experts that every token visits, built as one MLP of their joint width."""
    shared_expert_intermediate_size: int = Field(0, ge=0, le=MAX_WIDTH)
    """Width of the shared MLP; 0 for none."""
    first_k_dense_replace: int = Field(0, ge=0, le=MAX_LAYERS)
    """deepseek: this many first layers are dense."""
    decoder_sparse_step: int = Field(1, ge=1, le=MAX_LAYERS)
    """qwen MoE: every how many layers one is sparse."""
    mlp_only_layers: tuple[int, ...] = Field((), max_length=MAX_LAYERS)
    """qwen MoE: layers that are dense all the same."""
    n_group: int | None = Field(None, ge=1, le=2**14)
    """deepseek: groups the router chooses among first."""
    topk_group: int | None = Field(None, ge=1, le=2**14)
    """deepseek: groups it keeps."""
    topk_method: str | None = Field(None, max_length=64)
    """deepseek_v2: `greedy` or `group_limited_greedy`."""
    norm_topk_prob: bool = False
    """The weights of the chosen experts are made to sum to one."""
    output_router_logits: bool = False
    """The router's logits are returned and add a load-balancing loss."""

    global_head_dim: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """gemma4: width of a head in the layers with full attention; None where it is `head_dim`."""
    num_global_key_value_heads: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """gemma4: key and value heads of the layers with full attention; None where they are `num_key_value_heads`."""
    attention_k_eq_v: bool = False
    """gemma4: layers with full attention make their values of the key projection and have none for values."""
    num_kv_shared_layers: int = Field(0, ge=0, le=MAX_LAYERS)
    """gemma3n, gemma4: this many last layers take keys and values from the last layer of their kind before them."""
    use_double_wide_mlp: bool = False
    """gemma4: the MLP of those layers is twice as wide."""
    masks_blocks: bool = False
    """gemma4_unified: the multimodal model makes a mask of the blocks of tokens that are one image's, for text too."""
    hidden_size_per_layer_input: int = Field(0, ge=0, le=MAX_WIDTH)
    """gemma3n, gemma4: width of the embedding that each layer has of its own; 0 for none."""
    vocab_size_per_layer_input: int = Field(0, ge=0, le=MAX_VOCAB)
    """gemma3n, gemma4: rows of the table of those embeddings."""
    altup_num_inputs: int = Field(0, ge=0, le=2**8)
    """gemma3n: streams of hidden states, of which the layers compute one and predict and correct the others (AltUp)."""
    altup_correct_scale: bool = False
    """gemma3n: the computed stream is scaled before the layer's own embedding is added to the others."""
    laurel_rank: int = Field(0, ge=0, le=MAX_WIDTH)
    """gemma3n: width of the low-rank residual beside attention (LAuReL)."""
    intermediate_sizes: tuple[int, ...] = Field((), max_length=MAX_LAYERS)
    """gemma3n: width of each layer's MLP; empty where all have `intermediate_size`."""
    activation_sparsity_pattern: tuple[float, ...] = Field((), max_length=MAX_LAYERS)
    """gemma3n: share of each layer's gates in the MLP that is cut to zero; 0 for a dense one."""

    q_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Latent width of the queries; None projects them directly."""
    kv_lora_rank: int = Field(0, ge=0, le=MAX_WIDTH)
    """Latent width of keys and values; above 0 means multi-head latent attention."""
    qk_nope_head_dim: int = Field(0, ge=0, le=MAX_WIDTH)
    """Unrotated part of a query/key head."""
    qk_rope_head_dim: int = Field(0, ge=0, le=MAX_WIDTH)
    """Rotated part of a query/key head."""
    v_head_dim: int = Field(0, ge=0, le=MAX_WIDTH)
    """Width of a value head."""

    quantization_config: dict[str, Any] | None = None
    """How a checkpoint that comes quantised is stored."""
    torch_dtype: str | None = Field(None, max_length=64)
    """dtype of the published weights."""

    name: str | None = Field(None, max_length=256)
    """Name in memplan's catalogue, or of the folder that was read."""
    aliases: tuple[str, ...] = ()
    """Other names it answers to."""
    source: str | None = None
    """Where the numbers come from."""
    num_parameters: int | None = Field(None, ge=1)
    """Parameters of the transformers model, tied ones counted once."""
    hf_repo: str | None = Field(None, max_length=256)
    """Repository on the Hugging Face Hub."""
    notes: tuple[str, ...] = ()
    """What the reader should know: how sources that disagree were settled."""
    part_of: str | None = Field(None, max_length=64)
    """`model_type` of the multimodal model whose language model this is."""
    left_out: tuple[str, ...] = ()
    """What of the model is not estimated, or not as it is: every estimate says so."""

    @field_validator(
        "layer_types", "no_rope_layers", "mlp_only_layers", "intermediate_sizes", "activation_sparsity_pattern",
        "aliases", "notes", "left_out", mode="before",
    )  # fmt: skip
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})"
            )
        for name in ("layer_types", "no_rope_layers", "intermediate_sizes", "activation_sparsity_pattern"):
            if getattr(self, name) and len(getattr(self, name)) != self.num_hidden_layers:
                raise ValueError(f"`{name}` has {len(getattr(self, name))} entries for {self.num_hidden_layers} layers")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("`layer_types` names sliding layers, but `sliding_window` is not given")
        if "chunked_attention" in self.layer_types and self.attention_chunk_size is None:
            raise ValueError(
                "`layer_types` names layers that attend in chunks, but `attention_chunk_size` is not given"
            )
        if "linear_attention" in self.layer_types:
            for name in _LINEAR:
                if not getattr(self, name):
                    raise ValueError(f"`layer_types` names linear attention, but `{name}` is not given")
            if self.linear_num_value_heads % self.linear_num_key_heads:
                raise ValueError(
                    f"`linear_num_value_heads` ({self.linear_num_value_heads}) must be a multiple of "
                    f"`linear_num_key_heads` ({self.linear_num_key_heads})"
                )
        if self.rotary_dim is not None and self.rotary_dim > self.head_dim:
            raise ValueError(f"`rotary_dim` ({self.rotary_dim}) is above `head_dim` ({self.head_dim})")
        if self.model_type in _LEARNED_POSITIONS and self.max_position_embeddings is None:
            raise ValueError(f"`{self.model_type}` has a table of positions, and its length is not given")
        if self.model_type in _SPARSE and not self.num_experts and self.first_k_dense_replace < self.num_hidden_layers:
            raise ValueError(f"`{self.model_type}` is a mixture of experts, and has none")
        if self.num_experts:
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ValueError(
                    f"`num_experts_per_tok` ({self.num_experts_per_tok}) must be 1 to {self.num_experts}, "
                    "the number of experts"
                )
            if not self.moe_intermediate_size:
                raise ValueError("`moe_intermediate_size` is not given for a mixture of experts")
        if self.num_attention_heads % (self.num_global_key_value_heads or 1):
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of "
                f"`num_global_key_value_heads` ({self.num_global_key_value_heads})"
            )
        if self.num_kv_shared_layers:
            kinds = self.layer_types or ("full_attention",) * self.num_hidden_layers
            first = self.num_hidden_layers - self.num_kv_shared_layers
            if first < 1 or not set(kinds[first:]) <= set(kinds[:first]):
                raise ValueError(
                    f"`num_kv_shared_layers` ({self.num_kv_shared_layers}) leaves some of these layers without an "
                    "earlier one of their kind that makes keys and values"
                )
        if self.hidden_size_per_layer_input and not self.vocab_size_per_layer_input:
            raise ValueError("`hidden_size_per_layer_input` needs `vocab_size_per_layer_input`, the rows of its table")
        if self.model_type == "gemma3n_text":
            for name in _GEMMA3N:
                if not getattr(self, name):
                    raise ValueError(f"`gemma3n_text` is not built without `{name}`")
            if any(not 0.0 <= share < 1.0 for share in self.activation_sparsity_pattern):
                raise ValueError("`activation_sparsity_pattern` holds shares, from 0 to below 1")
            if any(not 1 <= width <= MAX_WIDTH for width in self.intermediate_sizes):
                raise ValueError(f"`intermediate_size` must be 1 to {MAX_WIDTH} in each layer")
        if self.kv_lora_rank and not (self.qk_rope_head_dim and self.v_head_dim):
            raise ValueError("`kv_lora_rank` needs `qk_rope_head_dim` and `v_head_dim`")
        return self

    def __hash__(self) -> int:
        # Not over every field: `quantization_config` is a dict. Equal specs still hash alike.
        return hash((self.model_type, self.name, self.hidden_size, self.num_hidden_layers, self.vocab_size))

    @property
    def label(self) -> str:
        """What to call it in text."""
        return self.name or self.hf_repo or self.model_type

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        """Indices of the layers with sliding-window attention."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == "sliding_attention")

    def layer_window(self, layer: int) -> int | None:
        """Sliding window, or chunk, of layer `layer` in tokens; None when its attention is full."""
        if self.layer_types and self.layer_types[layer] == "chunked_attention":
            return self.attention_chunk_size
        return self.sliding_window if self.layer_types and self.layer_types[layer] == "sliding_attention" else None

    def layer_head_dim(self, layer: int) -> int:
        """Width of a head of layer `layer`."""
        return self.head_dim if self.layer_window(layer) is not None else self.global_head_dim or self.head_dim

    def shares_kv(self, layer: int) -> bool:
        """Whether layer `layer` takes its keys and values from an earlier one."""
        return layer >= self.num_hidden_layers - self.num_kv_shared_layers

    def layer_intermediate_size(self, layer: int) -> int:
        """Width of the MLP of layer `layer`."""
        return self.intermediate_sizes[layer] if self.intermediate_sizes else self.intermediate_size

    def is_linear_layer(self, layer: int) -> bool:
        """Whether layer `layer` has linear attention."""
        return bool(self.layer_types) and self.layer_types[layer] == "linear_attention"

    def has_rope(self, layer: int) -> bool:
        """Whether layer `layer` rotates queries and keys (smollm3, exaone4 and llama4 leave some out)."""
        return not self.no_rope_layers or bool(self.no_rope_layers[layer])

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` has experts.

        Source: the decoder layers of qwen2_moe, qwen3_moe, deepseek_v2 and deepseek_v3 in transformers 5.17.
        """
        return (
            self.num_experts > 0
            and layer >= self.first_k_dense_replace
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe_layer(i) for i in range(self.num_hidden_layers))

    @property
    def is_mla(self) -> bool:
        """Multi-head latent attention (deepseek)."""
        return self.kv_lora_rank > 0

    @property
    def qk_head_dim(self) -> int:
        """Width of one query/key head as it enters attention."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of one value head as it enters attention."""
        return self.v_head_dim if self.is_mla else self.head_dim

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any] | str | Path) -> Self:
        """The spec that a Hugging Face `config.json` describes: a dict, a file, or a folder that holds one.

        A key that is missing takes the default of the transformers 5.17 config class of that `model_type`,
        and an old key name means what that class (or the repository's own code before it) takes it to mean.

        Raises:
            InvalidSpecError: not a readable JSON object, a family memplan does not know, or sizes that are
                missing, out of bounds or contradictory.
        """
        raw, where = read_config(config)
        prefix = f"{where}: " if where else ""
        try:
            return cls(**canonical_fields(raw))
        except InvalidSpecError as error:
            raise InvalidSpecError(prefix + error.message, hints=error.hints) from None
        except ValidationError as error:
            raise InvalidSpecError(
                prefix + _one_line(error),
                hints=["names and meaning are those of the model's `config.json` on the Hugging Face Hub"],
            ) from None


def _one_line(error: ValidationError) -> str:
    """The first thing that is wrong, without pydantic's type codes and links."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    field = ".".join(str(part) for part in first["loc"])
    return f"`{field}`: {message[0].lower()}{message[1:]}, not {first['input']!r:.60}"
