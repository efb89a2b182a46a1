"""The options that commands share, each written once.

`@takes_run` adds one option for every field of TrainConfig; the command gets those that were given, as
the mapping `run`. An option that is left out stays out, so that TrainConfig can fill it from the stack.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

import typer

from memplan.errors import MemplanError
from memplan.train_config import METHODS, Attention, FloatName, Loss, Method, QuantType, Stack

METHOD, BATCH, SAVERS = "Method", "Batch", "Memory savers"
PRECISION, DEVICE, OUTPUT = "Precision", "Device", "Output"


def complete_models(incomplete: str) -> list[str]:
    """Bundled models that begin so."""
    from memplan import catalog

    return [name for name in catalog.names() if name.startswith(incomplete)]


def complete_gpus(incomplete: str) -> list[str]:
    """GPUs of the table that begin so, and `auto`."""
    from memplan import gpus

    return [name for name in ("auto", *gpus.names()) if name.startswith(incomplete)]


def complete_optimizers(incomplete: str) -> list[str]:
    """Optimizers that begin so."""
    from memplan.memory.optimizers import OPTIMIZERS

    return [name for name in OPTIMIZERS if name.startswith(incomplete)]


def complete_methods(incomplete: str) -> list[str]:
    return [name for name in METHODS if name.startswith(incomplete)]


def complete_tiers(incomplete: str) -> list[str]:
    return [name for name in ("process", "reserved", "allocated") if name.startswith(incomplete)]


def complete_knobs(incomplete: str) -> list[str]:
    """What `--over` takes, up to the values."""
    from memplan.sweep import KNOBS

    return [f"{name}=" for name in KNOBS if name.startswith(incomplete)]


def listed(complete: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """`complete` for the last of several names with commas between them."""

    def complete_last(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in complete(last)]

    return complete_last


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A name (`memplan models` lists them), a Hugging Face id, or a path to a config.json or its folder.",
        autocompletion=complete_models,
        show_default=False,
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        metavar="GPU",
        help="A card (`memplan gpus` lists them), its memory such as 24GiB, or auto: the one in this machine.",
        autocompletion=complete_gpus,
        rich_help_panel=DEVICE,
        show_default=False,
    ),
]
Allocator = Annotated[
    str | None,
    typer.Option(
        metavar="CONF",
        help="PyTorch's allocator settings, such as expandable_segments:True (PYTORCH_ALLOC_CONF).",
        rich_help_panel=DEVICE,
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", metavar="", help="One JSON document; sizes are integers of bytes.", rich_help_panel=OUTPUT),
]


def _given(
    panel: str, name: str, kind: Any, metavar: str, text: str, *, default: str = "", short: str = "", **more: Any
) -> tuple[str, Any]:
    """An option with a value. Without `default` it is the stack that decides."""
    names = [f"--{name.replace('_', '-')}", *([short] if short else [])]
    shown = f"{text} Default {default}." if default else text
    option = typer.Option(*names, metavar=metavar, help=shown, rich_help_panel=panel, show_default=False, **more)
    return name, Annotated[kind | None, option]


def _flag(panel: str, name: str, text: str) -> tuple[str, Any]:
    """A flag without a value; its opposite, where there is one, is a flag of its own."""
    option = typer.Option(
        f"--{name.replace('_', '-')}", metavar="", help=text, rich_help_panel=panel, show_default=False
    )
    return name, Annotated[bool, option]


RUN_OPTIONS: dict[str, Any] = dict(
    [
        _given(
            METHOD, "method", Method, "METHOD",
            "full trains every weight, lora adapters on a frozen base, qlora adapters on a 4-bit (or int8) base.",
            default="lora",
        ),
        _given(
            METHOD, "stack", Stack, "STACK",
            "Whose defaults fill what is left out: torch is a plain loop, trainer transformers' Trainer, "
            "trl TRL's SFTTrainer.",
            default="trl",
        ),
        _given(METHOD, "rank", int, "N", "LoRA rank (r).", short="-r", default="16"),
        _given(
            METHOD, "target_modules", str, "NAMES", "Linear layers that get an adapter, such as q_proj,v_proj.",
            default="all-linear",
        ),
        _given(METHOD, "lora_dropout", float, "P", "Dropout before the adapter.", default="0"),
        _flag(METHOD, "use_dora", "Weight-decomposed adapters."),
        _given(METHOD, "modules_to_save", str, "NAMES", "Modules trained whole beside the adapters."),
        _given(
            METHOD, "quant_type", QuantType, "TYPE",
            "Storage of the frozen base under qlora: nf4, fp4 (bnb_4bit_quant_type) or int8 (load_in_8bit).",
            default="nf4",
        ),
        _flag(METHOD, "double_quant", "Quantise the scales too (bnb_4bit_use_double_quant). The default."),
        _flag(METHOD, "no_double_quant", "Keep the scales in fp32."),
        _flag(
            METHOD, "kbit_prep",
            "Embeddings, norms and head of a quantised base in fp32 (prepare_model_for_kbit_training).",
        ),
        _flag(METHOD, "no_kbit_prep", "Leave them in the dtype of the model."),
        _given(
            BATCH, "micro_batch_size", int, "N", "Sequences per forward pass (per_device_train_batch_size).",
            short="-b", default="1",
        ),
        _given(BATCH, "seq_len", int, "N", "Tokens per sequence (max_length).", short="-s"),
        _given(BATCH, "gradient_accumulation_steps", int, "N", "Passes per optimizer step.", default="1"),
        _flag(BATCH, "padding", "Sequences of unequal length, so that attention gets a mask (attention_mask)."),
        _flag(SAVERS, "gradient_checkpointing", "Keep each layer's input and recompute the rest."),
        _flag(SAVERS, "no_gradient_checkpointing", "Keep all that layers save for backward."),
        _flag(SAVERS, "reentrant", "The older variant of checkpointing (use_reentrant)."),
        _given(
            SAVERS, "attention", Attention, "KERNEL", "eager, sdpa or flash_attention_2 (attn_implementation).",
            default="sdpa",
        ),
        _given(
            SAVERS, "optimizer", str, "NAME",
            "By its Hugging Face name (optim), such as adamw_torch_fused or paged_adamw_8bit.",
            autocompletion=complete_optimizers,
        ),
        _given(
            SAVERS, "loss", Loss, "LOSS", "full logits, chunked as in TRL, or liger's fused kernel (use_liger_kernel)."
        ),
        _given(
            PRECISION, "weight_dtype", FloatName, "DTYPE", "fp32, bf16 or fp16: in which the model is loaded (dtype)."
        ),
        _given(
            PRECISION,
            "adapter_dtype",
            FloatName,
            "DTYPE",
            "fp32, bf16 or fp16: of the adapters (fp32 is PEFT's autocast_adapter_dtype).",
        ),
        _flag(PRECISION, "autocast", "Forward under bf16 autocast (bf16)."),
        _flag(PRECISION, "no_autocast", "Forward in the dtype of the weights."),
        _given(
            PRECISION, "max_grad_norm", float, "X", "Clip gradients to this norm; 0 does not clip.", default="1"
        ),
    ]
)  # fmt: skip
"""By field of TrainConfig; `no_` before a field's name is the flag that turns it off."""

_LISTS = ("modules_to_save",)


def fields_by_panel() -> dict[str, list[str]]:
    """The fields of TrainConfig under the panels of the help."""
    panels: dict[str, list[str]] = {}
    for name, annotation in RUN_OPTIONS.items():
        if not name.startswith("no_"):
            panels.setdefault(annotation.__metadata__[0].rich_help_panel, []).append(name)
    return panels


def takes_run(*, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Puts the options of a run (but those of `without`) in the place of the parameter `run`."""
    added = {
        name: inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if annotation.__origin__ is bool else None,
            annotation=annotation,
        )
        for name, annotation in RUN_OPTIONS.items()
        if name.removeprefix("no_") not in without
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name != "run"]
        signature = inspect.Signature([*kept[:1], *added.values(), *kept[1:]])

        def wrapper(**given: Any) -> None:
            run = fields_of({name: given.pop(name) for name in added})
            command(run=run, **given)

        wrapper.__name__, wrapper.__doc__, wrapper.__module__ = command.__name__, command.__doc__, command.__module__
        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return wrapper

    return decorate


def fields_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of TrainConfig that were given, from the values of RUN_OPTIONS.

    Raises:
        MemplanError: a flag and its opposite.
    """
    run: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or value is False:
            continue
        field = name.removeprefix("no_")
        if field in run:
            option = field.replace("_", "-")
            raise MemplanError(f"`--{option}` and `--no-{option}` exclude each other")
        if name in _LISTS:
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        run[field] = value if name == field else False
    return run
