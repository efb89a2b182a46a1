"""The search behind `plan`: count each run once for all GPUs, rank by the roofline, play only what would be chosen.

    time                       as `cost` says it
    a lower bound of memory    live tensors and what the process takes beside the allocator; it needs no allocator
    memory                     the run as it is, played on the caching allocator for the GPU's own runtime

A run is played when it would be on the front if it fitted; if it does not fit after all, the next one of its GPU and
method, a slower one, takes its place. What is not on the front then cannot be on it in truth. So the cost grows with
methods times micro-batches times two, plus the length of the front, and hardly with the number of GPUs: on one core
(tests/bench_plan.py, llama-7b) about 11 ms for each run counted, once for GPUs with cuDNN's attention and once for
those without, 0.1 ms for each GPU that it is then timed on, and 50 to 500 ms for each that is played. That is 1,700
configurations a second over 57 GPUs, 300 over ten and 60 on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from memplan.architectures import decoder_for
from memplan.cost import Interval, amount_of, bounds
from memplan.errors import MemplanError
from memplan.estimate import Estimate
from memplan.gpus import GpuSpec
from memplan.memory.composer import Composer
from memplan.memory.ledger import peak_of
from memplan.memory.program import Program
from memplan.memory.runtime import device_for, runtime_for
from memplan.model_spec import ModelSpec
from memplan.ops.device import Device
from memplan.prices import Price
from memplan.timing.layers import Linear, linears
from memplan.timing.model import StepTime, half_dtype, time_of
from memplan.timing.profile import fit_for
from memplan.timing.roofline import roofline
from memplan.timing.work import StepWork, step_work
from memplan.train_config import Method, TrainConfig
from memplan.units import gib


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run it, on one GPU."""

    gpu: str
    config: TrainConfig
    hours: float
    interval: Interval
    """Hours, (low, high)."""
    dollars: float | None
    price: Price | None
    process_bytes: int
    """What the run takes of the GPU's memory; a lower bound where it was not played."""
    memory_bytes: int
    """What the GPU has."""
    tokens_per_second: float
    mfu: float
    bound_by: str
    fits: bool
    """It was played and fits; otherwise all that is known is that nothing better fits."""
    measured_on_this_gpu: bool

    @property
    def method(self) -> Method:
        return self.config.method


class Counted:
    """One run counted for all GPUs whose kernels use memory alike: its work, and the tensors alone as a lower bound of
    its memory. `card` is the one of them whose workspaces are smallest."""

    def __init__(self, search: Search, config: TrainConfig, card: GpuSpec) -> None:
        self.search, self.config = search, config
        # The work of every micro-step after the second is that of the second, and its tensors are no fewer; and so it
        # is with steps, of which an estimate plays three.
        self.shown = config.but(gradient_accumulation_steps=min(config.gradient_accumulation_steps, 2))
        decoder = decoder_for(search.spec, self.shown, device_for(card))
        workspace_bytes = search.runtimes[card.name].workspace_bytes
        self.program = Composer(decoder, workspace_bytes=workspace_bytes, num_steps=2).compose()
        self.tensor_bytes = peak_of(self.program)

    @cached_property
    def work(self) -> StepWork:
        steps = self.config.gradient_accumulation_steps
        layers = self.search.layers_of(self.program, self.shown)
        return step_work(self.program, self.search.spec, self.shown, num_micro_steps=steps, layers=layers)

    def least_bytes(self, card: GpuSpec) -> int:
        runtime = self.search.runtimes[card.name]
        return self.tensor_bytes + runtime.beside_reserved(self.config, self.program.managed_bytes)


@dataclass
class Lane:
    """One method on one GPU: its runs that may fit, fastest first, and how far they have been tried."""

    card: GpuSpec
    method: Method
    price: Price | None
    runs: list[tuple[float, StepTime, Counted]] = field(default_factory=list)
    candidate: Candidate | None = None
    """The fastest run that has not been ruled out."""
    why_none: str = ""


class Search:
    """Counts, ranks and plays the runs of one plan."""

    def __init__(
        self, spec: ModelSpec, runs: dict[Method, list[TrainConfig]], num_tokens: int, cards: Iterable[GpuSpec]
    ) -> None:
        self.spec, self.runs, self.num_tokens = spec, runs, num_tokens
        self.num_configurations = self.num_played = 0
        self.fits = {card.name: fit_for(card) for card in cards}
        self.runtimes = {card.name: runtime_for(card) for card in cards}
        by_workspace = sorted(cards, key=lambda card: (-self.runtimes[card.name].workspace_bytes, card.name))
        self._smallest = {_device(card): card for card in by_workspace}
        self._layers: dict[Method, list[Linear]] = {}
        self._counted: dict[tuple[Device, TrainConfig], Counted] = {}
        self._played: dict[tuple[object, TrainConfig], Estimate] = {}

    def lane(self, card: GpuSpec, method: Method, price: Price | None) -> Lane:
        """The runs of `method` on `card`."""
        lane = Lane(card, method, price)
        self.num_configurations += len(self.runs[method])
        try:
            roofline(card, half_dtype(self.runs[method][0]), self.fits[card.name].constants)
        except MemplanError as error:
            lane.why_none = error.message
            return lane
        least = 0
        for counted in self._small_enough(card, method):
            needed = counted.least_bytes(card)
            least = min(least or needed, needed)
            if needed <= card.memory_bytes:
                time = time_of(counted.work, counted.config, card, self.fits[card.name].constants)
                lane.runs.append((self._hours(time, counted.config), time, counted))
        lane.runs.sort(key=lambda run: run[0])
        lane.why_none = f"does not fit: at least {gib(least)}, {gib(card.memory_bytes)} there"
        self._take_next(lane)
        return lane

    def _small_enough(self, card: GpuSpec, method: Method) -> Iterator[Counted]:
        """Runs by ascending micro-batch, up to the first whose tensors alone are too large."""
        too_large: set[bool] = set()
        device = _device(card)
        for config in self.runs[method]:
            if config.gradient_checkpointing in too_large:
                continue
            counted = self._counted.get((device, config))
            if counted is None:
                counted = self._counted[device, config] = Counted(self, config, self._smallest[device])
            if counted.least_bytes(card) > card.memory_bytes:
                too_large.add(config.gradient_checkpointing)
            yield counted

    def layers_of(self, program: Program, config: TrainConfig) -> list[Linear]:
        """The linear layers of a method: the same for all its runs."""
        if config.method not in self._layers:
            self._layers[config.method] = linears(program.weights, self.spec, config)
        return self._layers[config.method]

    def _hours(self, time: StepTime, config: TrainConfig) -> float:
        return time.step_seconds * amount_of(config, num_tokens=self.num_tokens).num_steps / 3600

    def _take_next(self, lane: Lane) -> None:
        lane.candidate = None
        if lane.runs:
            hours, time, counted = lane.runs[0]
            needed = counted.least_bytes(lane.card)
            lane.candidate = self._candidate(lane, counted.config, hours, time, needed)

    def settle(self, lanes: Iterable[Lane]) -> None:
        """Plays the candidates of `lanes`; one that does not fit gives way to the next of its lane."""
        for lane in lanes:
            candidate = lane.candidate
            assert candidate is not None
            estimate = self._play(candidate.config, lane.card)
            if estimate.process_bytes > lane.card.memory_bytes:
                lane.why_none = (
                    f"does not fit: {gib(estimate.process_bytes)} at micro-batch {candidate.config.micro_batch_size}, "
                    f"{gib(lane.card.memory_bytes)} there"
                )
                del lane.runs[0]
                self._take_next(lane)
                continue
            lane.candidate = replace(candidate, process_bytes=estimate.process_bytes, fits=True)

    def _play(self, config: TrainConfig, card: GpuSpec) -> Estimate:
        runtime = self.runtimes[card.name]
        # what of a GPU the played program depends on, names apart
        key = (_device(card), runtime.workspace_bytes, runtime.beside_reserved(config)), config
        if key not in self._played:
            self.num_played += 1
            self._played[key] = Estimate(self.spec, config, card)
        return self._played[key]

    def _candidate(
        self, lane: Lane, config: TrainConfig, hours: float, time: StepTime, process_bytes: int
    ) -> Candidate:
        fit = self.fits[lane.card.name]
        interval, _ = bounds(hours, time, lane.card, fit)
        return Candidate(
            gpu=lane.card.name,
            config=config,
            hours=hours,
            interval=interval,
            dollars=None if lane.price is None else hours * lane.price.usd_per_gpu_hour,
            price=lane.price,
            process_bytes=process_bytes,
            memory_bytes=lane.card.memory_bytes,
            tokens_per_second=time.tokens_per_second,
            mfu=time.mfu,
            bound_by=time.bound_by,
            fits=False,
            measured_on_this_gpu=fit.gpu == lane.card.name,
        )


def _device(card: GpuSpec) -> Device:
    """How kernels use memory on `card`, without the name."""
    return replace(device_for(card), name="")
