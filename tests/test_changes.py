"""Changes that make a run smaller: each is legal, each is what its flags say, and none is offered twice."""

from __future__ import annotations

import inspect
import sys
from itertools import product
from typing import Any

import pytest

from memplan.changes import CHANGES, applicable, flags
from memplan.cli import app
from memplan.estimate import estimate
from memplan.train_config import TrainConfig

MODEL = "smollm2-135m"
LARGE = {"micro_batch_size": 4, "seq_len": 1024}
EAGER = {"attention": "eager", "gradient_checkpointing": False}
RUNS: list[dict[str, Any]] = [
    {"method": method, "stack": stack, **LARGE, **extra}
    for method, stack, extra in product(
        ("full", "lora", "qlora"),
        ("torch", "trainer", "trl"),
        ({}, EAGER),
    )
]


def test_names_are_unique_and_every_change_is_meant_for_some_run() -> None:
    names = [change.name for change in CHANGES]
    assert len(set(names)) == len(names)
    runs: list[dict[str, Any]] = [*RUNS, {"method": "lora", "rank": 64}, {"method": "full", "optimizer": "adamw_torch"}]
    assert {change.name for run in runs for change, _ in applicable(TrainConfig(**run))} == set(names)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_change_makes_another_legal_run_to_which_it_no_longer_applies(run: dict[str, Any]) -> None:
    config = TrainConfig(**run)
    for change, fields in applicable(config):
        changed = config.but(**fields)
        assert changed != config
        assert all(getattr(changed, name) == value for name, value in fields.items())
        if not change.name.startswith("half"):
            assert change.fields(changed) is None


@pytest.mark.parametrize("run", RUNS[::2], ids=str)
def test_a_change_of_batch_keeps_the_global_batch(run: dict[str, Any]) -> None:
    config = TrainConfig(**run)
    seen = 0
    for _, fields in applicable(config):
        if "micro_batch_size" in fields:
            seen += 1
            changed = config.but(**fields)
            assert changed.micro_batch_size * changed.gradient_accumulation_steps == 4
    assert seen == 2


def test_no_change_takes_more_tensors() -> None:
    config = TrainConfig(method="full", stack="torch", attention="eager", weight_dtype="fp32", **LARGE)
    before = estimate(MODEL, config).tensor_bytes
    for change, fields in applicable(config):
        after = estimate(MODEL, config.but(**fields)).tensor_bytes
        assert after < 1.00002 * before, change.name  # fused optimizers keep their step counters on the card


def test_flags_are_options_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def record(model: str, run: dict[str, Any], **_: object) -> None:
        asked.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["memplan.estimate"], "estimate", record)
    said = [fields for run in RUNS for _, fields in applicable(TrainConfig(**run))]
    for fields in {flags(fields): fields for fields in said}.values():
        asked.clear()
        assert app.run(["estimate", MODEL, *flags(fields).split()]) == 130
        (run,) = asked
        made = TrainConfig(**{"method": "qlora" if "rank" in fields else "lora", "stack": "torch", **run})
        assert all(getattr(made, name) == value for name, value in fields.items())


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_no_stack_is_given_a_loss_that_it_does_not_have(run: dict[str, Any]) -> None:
    config = TrainConfig(**run)
    losses = {fields["loss"] for _, fields in applicable(config) if "loss" in fields}
    assert losses == {"torch": {"chunked", "liger"}, "trainer": {"liger"}, "trl": set()}[config.stack]


@pytest.mark.oracle
def test_sft_trainer_refuses_the_other_losses() -> None:
    """Whatever `loss_type` says it makes no logits, and it does not take Liger's loss."""
    sft_trainer = pytest.importorskip("trl.trainer.sft_trainer")
    source = inspect.getsource(sft_trainer.SFTTrainer.__init__)
    assert 'if liger_kernel_config.get("fused_linear_cross_entropy"):\n                raise ValueError' in source
    assert source.count("add_fused_lm_head(") == 1
