"""Training steps of the real model on fake tensors, phase by phase."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.oracle import cuda, loop, optimizers, sdpa, trainers, trl_loss
from tests.oracle.loop import Batch, Phases
from tests.oracle.model import build, fakeify, stored_tensors
from tests.oracle.tracker import Event, Tracker

NUM_STEPS = 2  # optimizer states appear in the first: the second is every later one


@dataclass(frozen=True)
class OracleResult:
    """`phases[step][name]` = (allocated at its end, peak within it), bytes; names as in `PHASES`."""

    phases: list[dict[str, tuple[int, int]]]
    model_bytes: int
    num_params: int
    num_trainable: int
    attention: str
    """What runs: `eager` for a family without sdpa support, whatever was asked."""
    events: list[Event] | None = field(repr=False)


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
        padding: the batch has a real padding mask; without, SFTTrainer's collator makes one of ones.
        optimizer: a Hugging Face `optim` string, or `adamw_torch_forloop`, `sgd_momentum`.
        loss: `full` logits, or TRL's `chunked`, which is the only one that its SFTTrainer has.
        stack: who calls the model: a plain loop, transformers' `Trainer` (under `autocast`, outputs cast to fp32),
            or TRL's `SFTTrainer`.
        sdpa_first: `cudnn` on H100, H200, B200 with the wheels of CUDA 13; `flash` elsewhere (sdpa.py).
        events: keep the event stream.
    """
    torch.set_num_threads(1)
    if loss not in {"torch": ("full", "chunked"), "trainer": ("full",), "trl": ("chunked",)}[stack]:
        raise ValueError(f"no run of {stack!r} with the loss {loss!r}")
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
        stack=stack,
    )
    tracker = Tracker(
        record=events,
        kernels=cuda.KERNELS,
        outputs=cuda.OUTPUTS,
        scratch=cuda.SCRATCH,
        host=sdpa.HOST_OUTPUTS,
        scalar=cuda.scalar_values(padding),
    )
    phases = Phases(tracker)
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
        if loss == "chunked":
            lifted.enter_context(trl_loss.on_gpu())
            trl_loss.add_fused_head(model, stack)

        def make_batch() -> Batch:
            names = ["input_ids", "labels", *(["attention_mask"] if padding or stack == "trl" else [])]
            return {name: torch.empty(batch, seq, dtype=torch.int64) for name in names}

        def compute_loss(inputs: Batch) -> torch.Tensor:
            fused = {"fused_lm_head": True} if loss == "chunked" else {}
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
                return model(**inputs, **fused, use_cache=False).loss

        if stack != "torch" and autocast:
            trainers.prepare_model(model)
        with tracker:
            tracker.begin("prepare")
            step_optimizer = optimizers.make(optimizer, model, stack)
            if stack == "torch":
                loop.train(compute_loss, trainable, step_optimizer, make_batch(), phases, NUM_STEPS, accumulation)
            else:
                trainer = trainers.make_trainer(model, stack)
                trainers.train(trainer, model, trainable, step_optimizer, make_batch, phases, NUM_STEPS, accumulation)
    return OracleResult(
        phases=phases.steps,
        model_bytes=model_bytes,
        num_params=num_params,
        attention=model.config._attn_implementation,
        num_trainable=sum(p.numel() for p in trainable),
        events=tracker.events,
    )
