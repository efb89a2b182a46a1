"""Whether it fits: verdicts, what makes it fit, and how far one can go."""

from __future__ import annotations

import json
from typing import Any

import pytest

from memplan import catalog, estimate, gpus
from memplan.cli import app
from memplan.cli.fit import fit_lines
from memplan.cli.output import rendered
from memplan.errors import MemplanError, UnknownNameError
from memplan.fit import KNOBS, FitReport, Fitter, Knob, fit, over_cards, solve
from memplan.memory.allocator_config import AllocatorConfig
from memplan.memory.runtime import runtime_for
from memplan.residuals import band
from memplan.train_config import TrainConfig
from memplan.units import GIB, MIB

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def short() -> FitReport:
    return fit("llama-7b", method="lora", micro_batch_size=8, gradient_checkpointing=False, gpu="rtx-4090")


def test_a_run_that_fits_says_how_much_further_it_goes() -> None:
    report = fit(MODEL, gpu="8GiB")
    assert (report.verdict, report.fits, report.suggestions) == ("fits", True, ())
    assert report.capacity_bytes == 8 * GIB
    assert report.headroom_bytes == 8 * GIB - report.process_bytes > 0
    assert set(report.largest) == set(KNOBS)
    for knob in KNOBS:
        assert report.largest[knob] >= getattr(report.estimate.config, knob)


def test_full_fine_tuning_has_no_rank_to_grow() -> None:
    assert set(fit(MODEL, method="full", gpu="8GiB").largest) == {"micro_batch_size", "seq_len"}
    assert solve(MODEL, method="full", gpu="8GiB", for_="rank") == 0


@pytest.mark.parametrize("knob", KNOBS)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_solve_gives_the_last_value_that_fits(knob: Knob, method: Any) -> None:
    last = solve(MODEL, method=method, gpu="4GiB", for_=knob)
    assert last > 1
    fitter = Fitter(catalog.load(MODEL), gpus.get("4GiB"), AllocatorConfig(), 4 * GIB)
    assert fitter.fits(TrainConfig(method=method, **{knob: last}))
    assert not fitter.fits(TrainConfig(method=method, **{knob: last + 1}))


@pytest.mark.parametrize("stack", ["torch", "trainer", "trl"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_two_micro_steps_are_a_lower_bound_of_more(stack: str, method: str) -> None:
    """By this `fit` rules out a run of many without composing it."""
    sizes = [
        estimate(MODEL, stack=stack, method=method, gradient_accumulation_steps=steps).tensor_bytes
        for steps in (2, 3, 8)
    ]
    assert sizes == sorted(sizes)


def test_a_run_of_many_micro_steps_gets_the_verdict_of_its_own_play() -> None:
    run = TrainConfig(method="full", gradient_accumulation_steps=8, seq_len=4096)
    made = estimate(MODEL, run, gpu="8GiB")
    needed, margin = made.process_bytes, band(made.config, made.tensor_bytes)
    answers = []
    for capacity in (needed + 2 * margin, needed + margin, needed // 2):
        fitter = Fitter(catalog.load(MODEL), gpus.get("8GiB"), AllocatorConfig(), capacity)
        answers.append(fitter.fits(run))
        assert fitter.fits(run) == (made.spare_within(capacity - margin - made.beside_reserved_bytes) >= 0)
    assert answers == [True, True, False]


def test_more_memory_never_lets_less_fit() -> None:
    sizes = [solve(MODEL, gpu=f"{size}GiB") for size in (1, 2, 4)]
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert sizes[-1] > sizes[-2]


def test_each_suggestion_makes_it_fit(short: FitReport) -> None:
    assert short.verdict == "does not fit"
    assert short.headroom_bytes < 0
    assert short.largest == {}
    assert short.suggestions
    fitter = Fitter(short.estimate.model, short.gpu, AllocatorConfig(), short.capacity_bytes)
    for suggestion in short.suggestions:
        config = short.estimate.config.but(**suggestion.fields)
        changed = fitter.estimate(config)
        assert fitter.fits(config)
        assert changed.process_bytes == suggestion.process_bytes
        assert suggestion.cost
        assert suggestion.flags.startswith("--")


def verdict_at(capacity_bytes: int) -> str:
    card = gpus.get("8GiB")
    return Fitter(catalog.load(MODEL), card, AllocatorConfig(), capacity_bytes).verdict(TrainConfig())


def test_too_close_to_call_lies_between_yes_and_no() -> None:
    order = ["does not fit", "too close to call", "fits"]
    needed = estimate(MODEL, gpu="8GiB").process_bytes
    verdicts = [verdict_at(needed + more * MIB) for more in range(-60, 90, 6)]  # the band is at least 32 MiB
    ranks = [order.index(verdict) for verdict in verdicts]
    assert ranks == sorted(ranks)
    assert (verdicts[0], verdicts[-1]) == ("does not fit", "fits")


def test_over_cards_gives_each_common_card_its_own_verdict() -> None:
    reports = over_cards("llama-7b", method="lora")
    assert [report.gpu.name for report in reports] == list(gpus.COMMON)
    by_size = sorted(reports, key=lambda report: report.capacity_bytes)
    assert [report.fits for report in by_size] == sorted(report.fits for report in by_size)
    assert {report.fits for report in reports} == {True, False}


@pytest.mark.parametrize(
    ("call", "error", "hint"),
    [
        (lambda: solve(MODEL, gpu="8GiB", for_="num_layers"), MemplanError, "`micro_batch_size`"),  # type: ignore[arg-type]
        (lambda: fit(MODEL, gpu="rtx-4091"), UnknownNameError, "rtx-4090"),
        (lambda: fit(MODEL, gpu="8GiB", free_only=True), MemplanError, "--gpu auto"),
        (lambda: fit("smollm2-136m", gpu="8GiB"), UnknownNameError, MODEL),
        (lambda: fit(MODEL, gpu="8"), MemplanError, "8GiB"),
    ],
)
def test_mistakes_are_named_with_a_hint(call: object, error: type[MemplanError], hint: str) -> None:
    with pytest.raises(error) as raised:
        call()  # type: ignore[operator]
    assert hint in " ".join(raised.value.hints)


def test_no_length_is_offered_that_the_model_has_no_positions_for() -> None:
    for model, positions in (("gpt2", 1024), ("opt-125m", 2048)):
        assert solve(model, gpu="h200", for_="seq_len") == positions
    assert solve("pythia-70m", gpu="h200", for_="seq_len") > 2048  # rotary: memory is the only end


def test_loading_may_take_more_than_training() -> None:
    """prepare_model_for_kbit_training casts the largest embeddings while both copies are there."""
    run: dict[str, Any] = {"method": "qlora", "stack": "torch", "seq_len": 16}
    made = estimate("bloom-7b1", gpu="8GiB", **run)
    loading = max(memory.peak_allocated_bytes for memory in made.simulation.phases[0].values())
    assert loading > made.reserved_bytes + 4 * band(made.config, made.tensor_bytes)
    between = (loading + made.reserved_bytes) // 2 + made.beside_reserved_bytes
    report = fit("bloom-7b1", gpu=f"{between / GIB:.9f}GiB", **run)
    assert report.headroom_bytes > 0
    assert report.verdict == "does not fit"
    assert "loading takes" in rendered(fit_lines(report))


def test_a_fraction_of_the_card_is_all_that_may_be_reserved() -> None:
    needed = estimate(MODEL, gpu="8GiB").reserved_bytes
    for share, verdict in ((1.1, "fits"), (0.9, "does not fit")):
        report = fit(MODEL, gpu="8GiB", allocator=f"per_process_memory_fraction:{share * needed / (8 * GIB):.6f}")
        assert report.verdict == verdict
        assert (report.headroom_bytes > 0) == report.fits
        assert bool(report.estimate.warnings) != report.fits
        assert abs(report.process_bytes - needed - report.estimate.beside_reserved_bytes) < MIB


def test_what_is_free_is_had_besides_what_the_driver_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an idle card, where NVML calls used what the driver keeps, both ask the same."""
    card = gpus.get("rtx-4090")
    kept = runtime_for(card).driver_bytes

    def detected(free_bytes: int) -> gpus.DetectedGpu:
        return gpus.DetectedGpu(card, 0, "RTX 4090", card.memory_bytes, free_bytes, "580")

    monkeypatch.setattr(Fitter, "largest", lambda *_: 0)
    monkeypatch.setattr(gpus, "detect", lambda: detected(card.memory_bytes - kept))
    assert fit(MODEL, gpu="auto", free_only=True).capacity_bytes == fit(MODEL, gpu="auto").capacity_bytes
    monkeypatch.setattr(gpus, "detect", lambda: detected(GIB))
    assert fit(MODEL, gpu="auto", free_only=True).capacity_bytes == GIB + kept


# The command


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((MODEL, "--gpu", "8GiB"), 0),
        ((MODEL, "--gpu", "8GiB", "--strict"), 0),
        (("llama-7b", "--gpu", "8GiB", "--method", "full"), 1),
        ((MODEL, "--gpu", "8GiB", "--free"), 2),
    ],
)
def test_exit_status_is_the_verdict(
    arguments: tuple[str, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run(["fit", *arguments]) == status
    out, err = capsys.readouterr()
    assert bool(err) == (status == 2)
    assert ("does not fit" in out) == (status == 1)


def test_json_says_what_python_says(capsys: pytest.CaptureFixture[str], short: FitReport) -> None:
    flags = ["--method", "lora", "-b", "8", "--no-gradient-checkpointing", "--gpu", "rtx-4090", "--json"]
    assert app.run(["fit", "llama-7b", *flags]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["headroom_bytes"]) == (short.verdict, short.headroom_bytes)
    assert [s["flags"] for s in document["suggestions"]] == [s.flags for s in short.suggestions]


def test_without_a_gpu_there_is_a_table_of_cards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise MemplanError("no NVIDIA GPU found", hints=["name one with `--gpu rtx-4090`"])

    monkeypatch.setattr(gpus, "detect", none)
    assert app.run(["fit", MODEL, "--json"]) == 0
    assert [card["gpu"]["name"] for card in json.loads(capsys.readouterr().out)["cards"]] == list(gpus.COMMON)
    assert app.run(["fit", MODEL, "--free"]) == 2
    assert "no NVIDIA GPU found" in capsys.readouterr().err
    assert app.run(["fit", MODEL, "--gpu", "auto"]) == 2
