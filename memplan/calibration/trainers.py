"""The steps of transformers' `Trainer` and of TRL's `SFTTrainer`, with the meter hung into their hooks.

Nothing of the libraries is replaced: methods are wrapped so that a phase begins before the original runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from memplan.calibration.adapters import cast_adapters, kbit_prepare, lora_config, prepare
from memplan.calibration.build import DTYPES
from memplan.calibration.loop import Trained, padded_length
from memplan.calibration.losses import LIGER_LOSS_ONLY
from memplan.calibration.meter import Meter
from memplan.calibration.optimizers import NOT_HUGGING_FACE, torch_optimizer
from memplan.calibration.record import Case
from memplan.errors import MemplanError
from memplan.train_config import TrainConfig


def train_with_library(
    case: Case,
    config: TrainConfig,
    model: Any,
    meter: Meter,
    *,
    ready: Callable[[Any], None],
    around_step: Callable[[int, bool], None],
) -> Trained:
    """`case.num_steps` steps of the library that `config.stack` names.

    `ready(model)` is called with the model that is trained, before the first step.

    Raises:
        MemplanError: a combination that the library does not offer.
    """
    with tempfile.TemporaryDirectory(prefix="memplan-") as folder:
        make = _sft_trainer if config.stack == "trl" else _trainer
        trainer = make(case, config, model, folder, meter.device)
        watch = _Watch(meter, around_step)
        watch.attach(trainer)
        ready(trainer.model)
        trainer.train()
    return Trained(optimizer=trainer.optimizer, step_seconds=watch.seconds)


def _trainer(case: Case, config: TrainConfig, model: Any, folder: str, device: torch.device) -> Any:
    args = transformers.TrainingArguments(**_arguments(case, config, folder, device))
    return transformers.Trainer(
        model=prepare(model, config),
        args=args,
        train_dataset=_Rows(_rows(case, config, model)),
        optimizer_cls_and_kwargs=_own_optimizer(config, args.learning_rate),
    )


def _sft_trainer(case: Case, config: TrainConfig, model: Any, folder: str, device: torch.device) -> Any:
    if config.padding and config.micro_batch_size == 1:
        raise MemplanError("SFTTrainer pads to the longest row of a batch, and this batch has one row")
    import datasets  # type: ignore[import-not-found,unused-ignore]
    import pyarrow  # type: ignore[import-not-found,import-untyped,unused-ignore]
    import trl

    if config.method == "qlora" and config.kbit_prep:
        model = kbit_prepare(model, config)
    args = trl.SFTConfig(
        **_arguments(case, config, folder, device),
        max_length=config.seq_len,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    # A fingerprint given is one not computed: hashing the rows through dill takes longer than the run.
    table = datasets.table.InMemoryTable(pyarrow.Table.from_pylist(_rows(case, config, model)))
    trainer = trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset(table, fingerprint=case.id),
        processing_class=_tokenizer(),
        peft_config=lora_config(config) if config.trains_adapters else None,
        optimizer_cls_and_kwargs=_own_optimizer(config, args.learning_rate),
    )
    usual = "bf16" if config.method == "qlora" else "fp32"
    if config.trains_adapters and config.adapter_dtype != usual:
        cast_adapters(trainer.model, DTYPES[config.adapter_dtype])
    return trainer


def _arguments(case: Case, config: TrainConfig, folder: str, device: torch.device) -> dict[str, Any]:
    """Training arguments that `config` says; all others stay the library's defaults."""
    said: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": case.num_steps,
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": config.autocast,
        "max_grad_norm": config.max_grad_norm,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
    }
    if config.gradient_checkpointing:
        said["gradient_checkpointing_kwargs"] = {"use_reentrant": config.reentrant}
    if config.optimizer not in NOT_HUGGING_FACE:
        said["optim"] = config.optimizer
    if config.loss == "liger":
        said |= {"use_liger_kernel": True, "liger_kernel_config": LIGER_LOSS_ONLY}
    return said


def _own_optimizer(config: TrainConfig, learning_rate: float) -> tuple[Any, dict[str, Any]] | None:
    if config.optimizer not in NOT_HUGGING_FACE:
        return None
    cls, options = torch_optimizer(config.optimizer)
    return cls, {"lr": learning_rate, **options}


def _rows(case: Case, config: TrainConfig, model: Any) -> list[dict[str, list[int]]]:
    """Token ids and labels, a row a sequence. With padding the first row of each batch is a quarter shorter.

    `Trainer`'s default collator does not pad, so for it the row comes padded, with its mask.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    num_rows = case.num_steps * config.gradient_accumulation_steps * config.micro_batch_size
    rows: list[dict[str, list[int]]] = []
    for ids in torch.randint(0, vocab_size, (num_rows, config.seq_len), generator=generator).tolist():
        length = config.seq_len
        if config.padding and len(rows) % config.micro_batch_size == 0:
            length = padded_length(config.seq_len)
        if config.stack == "trl":
            rows.append({"input_ids": ids[:length], "labels": ids[:length]})
            continue
        gone = config.seq_len - length
        row = {"input_ids": ids, "labels": ids[:length] + [-100] * gone}
        if config.padding:
            row["attention_mask"] = [1] * length + [0] * gone
        rows.append(row)
    return rows


class _Rows(torch.utils.data.Dataset[dict[str, list[int]]]):  # type: ignore[misc]
    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]


def _tokenizer() -> Any:
    """SFTTrainer wants one, and uses its pad token alone: the rows are token ids already."""
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


class _Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Begins the meter's phases from the Trainer's own hooks."""

    def __init__(self, meter: Meter, around_step: Callable[[int, bool], None]) -> None:
        self.meter = meter
        self.around_step = around_step
        self.step = 0
        self.micro_step = 0
        self.seconds: list[float] = []
        self._began = 0.0

    def attach(self, trainer: Any) -> None:
        trainer.add_callback(self)
        trainer.compute_loss = self._before(trainer.compute_loss, "forward")
        trainer.accelerator.backward = self._before(trainer.accelerator.backward, "backward")
        if trainer.args.max_grad_norm > 0:
            trainer._clip_grad_norm = self._before(trainer._clip_grad_norm, "clip")
        # In order: which row is short must not depend on a shuffle.
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)

    def _before(self, original: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.meter.begin(phase, self.step, self.micro_step if phase != "clip" else 0)
            return original(*args, **kwargs)

        return wrapped

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.step, self.micro_step = self.step + 1, 0
        self.around_step(self.step, True)
        self.meter.synchronize()
        self._began = time.perf_counter()

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.micro_step += 1

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.meter.begin("optimizer", self.step)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.meter.begin("zero", self.step)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.end()
        self.meter.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self.around_step(self.step, False)
