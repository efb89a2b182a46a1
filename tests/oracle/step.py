"""Training steps of the real model on fake tensors, phase by phase."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.oracle import cuda, optimizers, trl_loss
from tests.oracle.model import build, fakeify, stored_tensors
from tests.oracle.tracker import Event, Tracker

NUM_STEPS = 2  # optimizer states appear in the first: the second is every later one


@dataclass(frozen=True)
class OracleResult:
    """`phases[step][name]` = (allocated at its end, peak within it), bytes; names as in `PHASES`."""

    phases: list[dict[str, tuple[int, int]]]
    model_bytes: int
    input_bytes: int
    num_params: int
    num_trainable: int
    attention: str
    """What runs: `eager` for a family without sdpa support, whatever was asked."""
    events: list[Event] | None = field(repr=False)


PHASES = ("forward", "backward", "clip", "optimizer", "zero_grad")


def _quiet(function: Callable[..., OracleResult]) -> Callable[..., OracleResult]:
    """The libraries' warnings are not the oracle's (a test run makes them errors)."""

    @functools.wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> OracleResult:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*args, **kwargs)

    return quiet


@_quiet
def run(
    hf_config: dict[str, Any],
    *,
    method: str = "full",
    rank: int = 16,
    target_modules: str | tuple[str, ...] = "all-linear",
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    modules_to_save: tuple[str, ...] = (),
    double_quant: bool = True,
    kbit_prep: bool = True,
    adapter_dtype: str = "fp32",
    batch: int = 1,
    seq: int = 128,
    gradient_checkpointing: bool = False,
    reentrant: bool = False,
    attention: str = "sdpa",
    padding: bool = False,
    weight_dtype: str = "bf16",
    autocast: bool = False,
    optimizer: str = "adamw_torch",
    accumulation: int = 1,
    loss: str = "full",
    stack: str = "torch",
    sdpa_first: str = "cudnn",
    events: bool = False,
) -> OracleResult:
    """Two training steps; the bytes alive in each phase, as `torch.cuda.memory_allocated` would tell them.

    cuBLAS workspaces are not among them, nor what the caching allocator adds where it does not split a block.

    Args:
        attention: `sdpa` is what transformers takes by default: eager for a family that has no sdpa.
        padding: the batch has a real padding mask; without, Trainer and TRL pass one of ones.
        optimizer: a Hugging Face `optim` string, or `adamw_torch_forloop`, `sgd_momentum`.
        loss: `full` logits, or TRL's `chunked` (the `trl` package must be importable; implies `stack="trl"`).
        stack: who calls the model: a plain loop, transformers' `Trainer` (under `autocast`, outputs cast to fp32),
            or TRL's `SFTTrainer`.
        sdpa_first: `cudnn` on H100, H200, B200 with the wheels of CUDA 13; `flash` elsewhere (sdpa.py).
        events: keep the event stream.
    """
    torch.set_num_threads(1)
    if loss not in ("full", "chunked"):
        raise ValueError(f"no oracle for loss {loss!r}")
    if loss == "chunked" and stack == "torch":
        stack = "trl"
    model, num_params = build(
        hf_config,
        method=method,
        weight_dtype=weight_dtype,
        attention=attention,
        rank=rank,
        target_modules=target_modules,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        modules_to_save=modules_to_save,
        double_quant=double_quant,
        kbit_prep=kbit_prep,
        adapter_dtype=adapter_dtype,
        gradient_checkpointing=gradient_checkpointing,
        reentrant=reentrant,
    )
    tracker = Tracker(
        record=events,
        kernels=cuda.KERNELS,
        outputs=cuda.OUTPUTS,
        scratch=cuda.SCRATCH,
        scalar=cuda.scalar_values(padding),
    )
    with ExitStack() as lifted:
        lifted.enter_context(FakeTensorMode())
        lifted.enter_context(cuda.emulated(tracker, sdpa_first))
        fakeify(model)
        tracker.module_names = {id(module): name for name, module in model.named_modules()}
        for name, tensor in stored_tensors(model):
            if tracker.watch(tensor, "load", name):
                tracker._allocate(tensor.untyped_storage()._cdata)
        model_bytes = tracker.live_bytes
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = optimizers.parameter_groups(model, stack)
        compute_loss: Callable[..., torch.Tensor] = _loss_of_loop(autocast)
        if loss == "chunked":
            lifted.enter_context(trl_loss.on_gpu())
            trl_loss.add_fused_head(model)
            compute_loss = trl_loss.compute_loss
        elif stack != "torch":
            compute_loss = _loss_of_trainer
        if stack != "torch":
            _prepare_for_trainer(model, autocast)
        with tracker:
            tracker.begin("inputs")
            inputs = _inputs(batch, seq, with_mask=padding or stack != "torch")
            input_bytes = tracker.live_bytes - model_bytes
            phases = _steps(
                tracker,
                model,
                trainable,
                optimizers.make(optimizer, groups),
                inputs,
                compute_loss=compute_loss,
                counts_items=stack != "torch",
                accumulation=accumulation,
            )
    return OracleResult(
        phases=phases,
        model_bytes=model_bytes,
        input_bytes=input_bytes,
        num_params=num_params,
        attention=model.config._attn_implementation,
        num_trainable=sum(p.numel() for p in trainable),
        events=tracker.events,
    )


def _inputs(batch: int, seq: int, with_mask: bool) -> dict[str, torch.Tensor]:
    """Trainer's and TRL's collators give a mask always, one of ones where nothing is padded."""
    names = ["input_ids", "labels", *(["attention_mask"] if with_mask else [])]
    return {name: torch.empty(batch, seq, dtype=torch.int64) for name in names}


def _steps(
    tracker: Tracker,
    model: torch.nn.Module,
    trainable: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, torch.Tensor],
    *,
    compute_loss: Callable[..., torch.Tensor],
    counts_items: bool,
    accumulation: int,
) -> list[dict[str, tuple[int, int]]]:
    phases = []
    for tracker.step in range(NUM_STEPS):
        done: dict[str, tuple[int, int]] = {}

        def mark(name: str, done: dict[str, tuple[int, int]] = done) -> None:
            alloc, peak = tracker.end()
            done[name] = (alloc, max(peak, done.get(name, (0, 0))[1]))

        tracker.begin("forward")
        # Trainer.get_batch_samples: the labelled tokens of all the step's batches.
        num_items = sum((inputs["labels"].ne(-100)).sum() for _ in range(accumulation)) if counts_items else None
        for number in range(accumulation):
            if number:
                tracker.begin("forward")
            loss = compute_loss(model, inputs, num_items)
            if accumulation > 1 and not counts_items:
                loss = loss / accumulation
            mark("forward")
            tracker.begin("backward")
            loss.backward()
            mark("backward")
            tracker.begin("clip")
            # The loss holds its graph's leaves (an embedding made to require grad, and its gradient) until here.
            del loss
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0, foreach=True)
        if not counts_items:
            del grad_norm  # Trainer holds it until it has logged the step
        mark("clip")
        tracker.begin("optimizer")
        optimizer.step()
        mark("optimizer")
        tracker.begin("zero_grad")
        optimizer.zero_grad(set_to_none=True)
        grad_norm = None
        mark("zero_grad")
        phases.append(done)
    return phases


def _loss_of_loop(autocast: bool) -> Callable[..., torch.Tensor]:
    """A plain loop: autocast around the forward, the outputs dropped but for the loss."""

    def compute_loss(model: Any, inputs: dict[str, torch.Tensor], num_items: None) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            return model(**inputs, use_cache=False).loss

    return compute_loss


def _loss_of_trainer(model: Any, inputs: dict[str, torch.Tensor], num_items: torch.Tensor) -> torch.Tensor:
    """transformers' `Trainer.compute_loss`; accelerate has wrapped the model's forward (`_prepare_for_trainer`)."""
    outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items)
    return outputs["loss"]


def _prepare_for_trainer(model: Any, autocast: bool) -> None:
    """`Accelerator.prepare_model` under bf16: autocast inside, outputs cast to fp32 outside."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    if not autocast:
        return
    wrapped = torch.autocast("cpu", dtype=torch.bfloat16)(type(model).forward)
    if "forward" in vars(model):  # TRL's fused head replaces the instance's
        wrapped = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(convert_outputs_to_fp32(wrapped), model)
