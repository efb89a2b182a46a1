"""Training steps of the real model on fake tensors, phase by phase."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.oracle import cuda
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
    sdpa_first: str = "cudnn",
    events: bool = False,
) -> OracleResult:
    """Two training steps; the bytes alive in each phase, as `torch.cuda.memory_allocated` would tell them."""
    torch.set_num_threads(1)
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
    tracker = Tracker(record=events, kernels=cuda.KERNELS, outputs=cuda.OUTPUTS, scratch=cuda.SCRATCH, scalar=cuda.scalar_value)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(cuda.emulated(tracker, sdpa_first))
        fakeify(model)
        tracker.module_names = {id(module): name for name, module in model.named_modules()}
        for name, tensor in stored_tensors(model):
            if tracker.watch(tensor, "load", name):
                tracker._allocate(tensor.untyped_storage()._cdata)
        model_bytes = tracker.live_bytes
        trainable = [p for p in model.parameters() if p.requires_grad]
        make_optimizer = cuda.OPTIMIZERS[optimizer]
        with tracker:
            tracker.begin("inputs")
            inputs = _inputs(hf_config, model, batch, seq, padding)
            input_bytes = tracker.live_bytes - model_bytes
            phases = _steps(
                tracker, model, trainable, make_optimizer(trainable), inputs, autocast=autocast, accumulation=accumulation
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


def _inputs(
    hf_config: dict[str, Any], model: torch.nn.Module, batch: int, seq: int, padding: bool
) -> dict[str, torch.Tensor]:
    inputs = {
        "input_ids": torch.empty(batch, seq, dtype=torch.int64),
        "labels": torch.empty(batch, seq, dtype=torch.int64),
    }
    if padding:
        inputs["attention_mask"] = torch.empty(batch, seq, dtype=torch.int64)
    return inputs


def _steps(
    tracker: Tracker,
    model: torch.nn.Module,
    trainable: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, torch.Tensor],
    *,
    autocast: bool,
    accumulation: int,
) -> list[dict[str, tuple[int, int]]]:
    phases = []
    for tracker.step in range(NUM_STEPS):
        done: dict[str, tuple[int, int]] = {}

        def mark(name: str, done: dict[str, tuple[int, int]] = done) -> None:
            alloc, peak = tracker.end()
            done[name] = (alloc, max(peak, done.get(name, (0, 0))[1]))

        for _ in range(accumulation):
            tracker.begin("forward")
            loss = _forward(model, inputs, autocast)
            if accumulation > 1:
                loss = loss / accumulation
            mark("forward")
            tracker.begin("backward")
            loss.backward()
            mark("backward")
            tracker.begin("clip")
            # The loss holds its graph's leaves (an embedding made to require grad, and its gradient) until here.
            del loss
        torch.nn.utils.clip_grad_norm_(trainable, 1.0, foreach=True)
        mark("clip")
        tracker.begin("optimizer")
        optimizer.step()
        mark("optimizer")
        tracker.begin("zero_grad")
        optimizer.zero_grad(set_to_none=True)
        mark("zero_grad")
        phases.append(done)
    return phases


def _forward(model: Callable[..., Any], inputs: dict[str, torch.Tensor], autocast: bool) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        return model(**inputs, use_cache=False).loss
