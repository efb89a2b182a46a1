"""`estimate`: the one call behind everything else.

The program (what is allocated and freed, in order) is there at once: layers of a kind are recorded once, and only
their weights are counted one by one. The ledger sums it up when what is alive is first asked for. The caching
allocator, which takes longer, is played when a tier is first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from memplan import catalog, gpus
from memplan.architectures import decoder_for
from memplan.architectures.peft_names import name_warnings
from memplan.garbage import collector_paused
from memplan.gpus import GpuSpec
from memplan.memory.allocator import OutOfMemory
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.composer import Composer
from memplan.memory.ledger import Ledger, fold, peak_of
from memplan.memory.program import Program
from memplan.memory.runtime import Runtime, device_for, runtime_for
from memplan.memory.simulate import Simulation, simulate
from memplan.model_spec import ModelSpec
from memplan.ops.tensor import round_block
from memplan.prequantized import check_storage
from memplan.train_config import NO_USE_FOR, TrainConfig
from memplan.units import gib

ModelLike = ModelSpec | str | os.PathLike[str]
COMPONENTS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer_states",
    "activations",
    "loss",
    "temporaries",
    "workspaces",
    "inputs",
    "allocator_rounding",
)


class Estimate:
    """What one run takes, tier by tier. All sizes are bytes; peaks are over the training steps.

    `allocated_bytes` is what `torch.cuda.max_memory_allocated` reports, `reserved_bytes`
    `max_memory_reserved`, `process_bytes` what NVML (v1) shows as used on an otherwise idle card: with what the
    driver keeps for itself, so what a card of that total must hold; `nvidia-smi` shows a bit less.
    """

    @collector_paused()
    def __init__(
        self, model: ModelSpec, config: TrainConfig, gpu: GpuSpec | None, allocator: AllocatorConfig | None = None
    ) -> None:
        self.model = model
        self.config = config
        self.gpu = gpu
        self.allocator_config = allocator or AllocatorConfig()
        self.runtime: Runtime = runtime_for(gpu)
        check_storage(model, config)
        decoder = decoder_for(model, config, device_for(gpu))
        self.program: Program = Composer(decoder, workspace_bytes=self.runtime.workspace_bytes).compose()
        names = name_warnings(model.model_type, config, self.program.weights)
        self._warnings: tuple[str, ...] = (*decoder.warnings(), *_count_warning(model, self.program), *names)

    @cached_property
    def ledger(self) -> Ledger:
        """What is alive when, by what it is for."""
        return fold(self.program)

    @cached_property
    def simulation(self) -> Simulation:
        """The program played on the caching allocator; without the limit it may have where the run exceeds that."""
        try:
            return simulate(self.program, self.allocator_config)
        except OutOfMemory:
            if self.allocator_config.limit_bytes is None:
                raise
            return simulate(self.program, replace(self.allocator_config, limit_bytes=None))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What its user should know of the run, one sentence each."""
        limit_bytes = self.allocator_config.limit_bytes
        if limit_bytes is None or self.spare_within(limit_bytes) >= 0:
            return self._warnings
        return (
            *self._warnings,
            f"the run does not get through with the {gib(limit_bytes)} that `per_process_memory_fraction` allows: "
            "reserved and process are what it takes without",
        )

    def spare_within(self, capacity_bytes: int) -> int:
        """Bytes to spare when the driver has `capacity_bytes` for the allocator; below 0 for a run that fails.

        0 where the run gets through only by giving cached memory back, and where it fails, what is missing there and
        then. A run that no limit touches is played once: under the limit and without it are the same.
        """
        limit_bytes = self.allocator_config.limit_bytes
        if limit_bytes is not None:
            capacity_bytes = min(capacity_bytes, limit_bytes)
        known = self.__dict__.get("simulation")
        if known is not None and not known.met_limit and known.highest_reserved_bytes <= capacity_bytes:
            return int(capacity_bytes - known.highest_reserved_bytes)
        if self.tensor_bytes > capacity_bytes:  # nothing to play where the tensors alone are too much
            return capacity_bytes - self.tensor_bytes
        try:
            played = simulate(self.program, replace(self.allocator_config, capacity_bytes=capacity_bytes))
        except OutOfMemory as out:
            return -max(out.missing_bytes, 1)
        if played.met_limit:
            return 0
        self.simulation = played
        return capacity_bytes - played.highest_reserved_bytes

    @property
    def allocated_bytes(self) -> int:
        return self.simulation.peak_allocated_bytes

    @property
    def reserved_bytes(self) -> int:
        return self.simulation.peak_reserved_bytes

    @property
    def process_bytes(self) -> int:
        return self.reserved_bytes + self.beside_reserved_bytes

    @property
    def beside_reserved_bytes(self) -> int:
        """What the process takes beside the caching allocator: driver, context, kernels, managed memory."""
        return self.runtime.beside_reserved(self.config, self.program.managed_bytes)

    @property
    def load_process_bytes(self) -> int:
        """Process bytes at the highest point before and in the steps: loading may take more than training."""
        return self.simulation.highest_reserved_bytes + self.beside_reserved_bytes

    @cached_property
    def tensor_bytes(self) -> int:
        """Peak of live tensors, each in whole blocks of 512 bytes: `allocated_bytes` less what the allocator
        hands out beyond the request. The fast lower bound."""
        return peak_of(self.program)

    @property
    def peak_phase(self) -> str:
        """Where in the step the allocated peak falls."""
        return self.ledger.peak_phase

    @property
    def components(self) -> dict[str, int]:
        """Bytes alive at the allocated peak by what they are for; they sum to `allocated_bytes`."""
        alive = self.ledger.components
        parts = {name: alive.get(name, 0) for name in COMPONENTS}
        parts["allocator_rounding"] = self.allocated_bytes - self.ledger.peak_bytes
        assert sum(parts.values()) == self.allocated_bytes, (parts, alive)
        return {name: size for name, size in parts.items() if size}

    @property
    def phases(self) -> dict[str, int]:
        """Allocated peak of each phase of a step in the steady state, and of the load."""
        steps = self.simulation.phases
        peaks = {name: memory.peak_allocated_bytes for name, memory in steps[-1].items()}
        load = max(m.peak_allocated_bytes for name, m in steps[0].items() if name in ("load", "prepare"))
        return {"load": load, **peaks}

    @property
    def num_params(self) -> int:
        """Parameters of the model, adapters included, tied ones once."""
        return sum(w.numel for w in self.program.weights if not w.buffer)

    @property
    def num_trainable_params(self) -> int:
        return sum(w.numel for w in self.program.weights if w.trains)

    @property
    def adapter_bytes(self) -> int:
        """Size of the saved adapter (tensors of adapter_model.safetensors); 0 for a full fine-tune."""
        if not self.config.trains_adapters:
            return 0
        return sum(w.numel * w.dtype.itemsize for w in self.program.weights if w.trains)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of the saved model (tensors of its safetensors files) in the dtype it is trained in; with
        adapters that of the adapter."""
        if self.config.trains_adapters:
            return self.adapter_bytes
        return sum(w.numel * w.dtype.itemsize for w in self.program.weights if not w.buffer)

    def bytes_of(self, component: str) -> int:
        """Resident bytes of `weights`, `adapters`, `gradients` or `optimizer_states`, wherever the peak falls."""
        weights = self.program.weights
        if component in ("weights", "adapters"):
            return sum(w.resident_bytes for w in weights if w.kind == component)
        if component == "gradients":
            return sum(round_block(w.numel * w.dtype.itemsize) for w in weights if w.learns)
        assert component == "optimizer_states", component
        return self.program.optimizer_state_bytes


def _count_warning(model: ModelSpec, program: Program) -> list[str]:
    """That the config or the files of the model tell of another number of parameters than its family builds."""
    declared = model.num_parameters
    counted = sum(w.numel for w in program.base_weights)
    stored_head = model.vocab_size * (model.word_embed_proj_dim or model.hidden_size) * model.tie_word_embeddings
    if declared is None or declared - counted in (0, stored_head):  # files may hold a tied head a second time
        return []
    more = declared > counted
    return [
        f"the model says that it has {declared:,} parameters, and `{model.model_type}` of these sizes has {counted:,}: "
        f"{abs(declared - counted):,} ({abs(declared - counted) / declared * 100:.2g} %) "
        f"{'are not' if more else 'too many are'} counted"
    ]


def estimate(
    model: ModelLike,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    gpu: GpuSpec | str | None = None,
    allocator: AllocatorConfig | str | None = None,
    **fields: Any,
) -> Estimate:
    """What fine-tuning `model` takes.

    Args:
        model: a name of the catalogue, a Hub id, a path to a config.json or its folder, or a ModelSpec.
        config: the run; or give its fields as keywords: `estimate("llama-7b", method="qlora", rank=16)`.
        gpu: a name, a size such as `24GiB`, or `auto`; decides workspaces and what the driver takes.
        allocator: PYTORCH_ALLOC_CONF, as text or parsed.

    Raises:
        MemplanError: an unknown model, GPU or optimizer, or fields that make no run.
    """
    spec, decided = catalog.load_with_settings(model)
    run = make_config(config, decided=decided, **fields)
    card = gpus.get(gpu) if isinstance(gpu, str) else gpu
    settings = allocator
    if isinstance(settings, str):
        settings = AllocatorConfig.parse(settings, device_bytes=None if card is None else card.memory_bytes)
    return Estimate(spec, run, card, settings)


def make_config(
    config: TrainConfig | Mapping[str, Any] | None = None, *, decided: Mapping[str, Any] | None = None, **fields: Any
) -> TrainConfig:
    """A TrainConfig from one, from a mapping, or from keywords; keywords win.

    `decided` is what the model's files say where the user does not (`catalog.load_with_settings`); what the run's
    method has no use for is left out.

    Raises:
        MemplanError: what pydantic finds wrong, in one line.
    """
    try:
        if isinstance(config, TrainConfig) and not decided:
            return config.but(**fields) if fields else config
        if isinstance(config, TrainConfig):
            config = config.model_dump(include=config.model_fields_set)
        said = {**(config or {}), **fields}
        method = said.get("method", (decided or {}).get("method", "lora"))
        unused = NO_USE_FOR.get(str(method), ())
        kept = {name: value for name, value in (decided or {}).items() if name not in unused}
        return TrainConfig.model_validate(kept | said)
    except ValidationError as error:
        from memplan.config_errors import complaint

        raise complaint(error) from None
