"""Sweeps, pictures, validation of records, and the commands that draw and replay: no window, no GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from memplan import estimate, gpus, plot
from memplan.calibration.choose import cases_for
from memplan.cli import app
from memplan.cli.output import rendered
from memplan.cli.validate import row_lines
from memplan.errors import MemplanError
from memplan.gpus import DetectedGpu
from memplan.plot import areas
from memplan.plot.steps import step_states
from memplan.sweep import MAX_POINTS, parse_over, sweep
from memplan.units import GIB
from memplan.validation import validate

MODEL = "smollm2-135m"
MEASURED = sorted((Path(__file__).parent / "data" / "measured").glob("*.jsonl"))[:1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank=4,8, 8", ("rank", (4, 8))),
        ("rank=4:40:x2", ("rank", (4, 8, 16, 32))),
        ("seq-len=512:2048:512", ("seq_len", (512, 1024, 1536, 2048))),
        ("lora_dropout=0,0.5", ("lora_dropout", (0.0, 0.5))),
        ("method=full,lora", ("method", ("full", "lora"))),
    ],
)
def test_parse_over(text: str, expected: tuple[str, tuple[object, ...]]) -> None:
    assert parse_over(text) == expected


@pytest.mark.parametrize(
    "text",
    ["rank", "rank=", "rank=,", "rnk=4", "rank=four", "rank=4:8", "rank=8:4:1", "rank=4:8:x1", "rank=4:8:-1",
     "rank=0:8:1", f"seq_len=1:{MAX_POINTS + 5}:1"],
)  # fmt: skip
def test_what_is_no_sweep_is_an_error(text: str) -> None:
    with pytest.raises(MemplanError):
        parse_over(text)


def test_a_sweep_is_its_estimates_with_the_last_knob_fastest() -> None:
    swept = sweep(MODEL, {"method": ("full", "lora"), "rank": (4, 8)}, lora_dropout=0.1)
    assert [point.values for point in swept.points] == [("full", 4), ("full", 8), ("lora", 4), ("lora", 8)]
    lora = list(swept.along("rank", method="lora"))
    for point in lora:
        alone = estimate(MODEL, method="lora", rank=point.values[1], lora_dropout=0.1)
        assert point.estimate.process_bytes == alone.process_bytes
    assert lora[0].estimate.process_bytes < lora[1].estimate.process_bytes


@pytest.mark.parametrize("over", [{"rank": ()}, {"rnk": (4,)}, {"rank": range(1, MAX_POINTS + 2)}])
def test_a_sweep_over_nothing_too_much_or_the_unknown(over: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(MemplanError):
        sweep(MODEL, over)


def test_lines_have_the_estimates_heights_and_the_cards_memory() -> None:
    (ax,) = plot.over_rank(MODEL, (4, 64), capacities=("rtx-4090",)).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("LoRA rank", "process memory at the peak, GiB")
    lora, qlora, card = ax.get_lines()
    assert (lora.get_label(), qlora.get_label()) == ("LoRA", "QLoRA")
    assert np.asarray(lora.get_ydata())[1] == estimate(MODEL, rank=64, gpu="rtx-4090").process_bytes / GIB
    assert set(np.asarray(card.get_ydata())) == {gpus.get("rtx-4090").memory_bytes / GIB}


@pytest.mark.parametrize("tier", ["allocated", "reserved", "process"])
def test_stacks_add_up_to_their_tier(tier: str) -> None:
    (ax,) = plot.over(MODEL, "method", ["full", "lora"], stacked=True, tier=tier).axes
    tops = [max(bar.get_y() + bar.get_height() for bars in ax.containers for bar in (bars[i],)) for i in (0, 1)]
    expected = [getattr(estimate(MODEL, method=method), f"{tier}_bytes") / GIB for method in ("full", "lora")]
    assert tops == pytest.approx(expected)
    assert ax.get_ylabel() == f"{tier} memory at the peak, GiB"


def test_small_parts_of_a_stack_are_drawn_as_one() -> None:
    shares = areas.shares_of([{"weights": 990, "loss": 4, "inputs": 6}, {"weights": 500, "loss": 100}])
    assert shares == {"weights": [990, 500], "loss": [4, 100], "other": [6, 0]}


def test_a_title_states_what_all_runs_share() -> None:
    (ax,) = plot.over(MODEL, "stack", ["torch", "trl"]).axes
    title = ax.get_title()
    assert title.startswith(f"{MODEL}, LoRA, rank 16, micro-batch 1")
    assert "sdpa" in title
    assert not [word for word in ("trl", "torch", "loss", "adamw", "checkpointing") if word in title]
    (step,) = plot.timeline(MODEL, stack="torch").axes
    assert "stack torch, loss full, adamw_torch, sdpa, no checkpointing" in step.get_title()


def test_a_picture_is_drawn_on_the_axes_it_is_given() -> None:
    figure = Figure()
    axes = figure.subplots(2, 2)
    assert plot.over_rank(MODEL, (4, 8), ax=axes[0, 0]) is figure
    assert plot.over(MODEL, "method", ["full", "lora"], stacked=True, ax=axes[0, 1]) is figure
    assert plot.heat_map(MODEL, ("rank", [4, 8]), ("seq_len", [128, 256]), ax=axes[1, 0]) is figure
    assert plot.timeline(MODEL, ax=axes[1, 1]) is figure
    assert all(ax.has_data() and ax.get_title() for ax in axes.flat)


def test_nothing_lies_between_two_models() -> None:
    (ax,) = plot.over(MODEL, "model", [MODEL, "smollm2-360m"]).axes
    assert ax.get_lines()[0].get_linestyle() == "None"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [MODEL, "smollm2-360m"]


def test_a_heat_map_has_a_cell_a_pair_and_labels() -> None:
    figure = plot.heat_map(MODEL, ("seq_len", [128, 256, 512]), ("micro_batch_size", [1, 2]), capacities=("24GiB",))
    ax, bar = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens per sequence", "micro-batch, sequences")
    cells = ax.images[0].get_array()
    assert cells is not None and cells.shape == (2, 3)
    assert bar.get_ylabel() == "process memory at the peak, GiB"


def test_borders_of_a_map_are_what_fits_on_each_card() -> None:
    """Of each card with its own driver and workspaces; those with the same cells share a line."""
    lengths, batches = [1024, 2048, 4096], [1, 8]
    figure = plot.heat_map("llama-7b", ("seq_len", lengths), ("micro_batch_size", batches),
                           capacities=("rtx-4080", "rtx-3090", "rtx-4090", "h200", "rtx-4060"))  # fmt: skip
    assert [line.get_label() for line in figure.axes[0].get_lines()] == [
        "rtx-4060 8.0 GiB (none fits)", "rtx-4080 16.0 GiB", "rtx-4090 24.0 GiB, rtx-3090 24.0 GiB",
        "h200 140.4 GiB (all fit)",
    ]  # fmt: skip
    for line, card in zip(figure.axes[0].get_lines()[1:3], ("rtx-4080", "rtx-4090"), strict=True):
        xs, ys = (np.asarray(data).reshape(-1, 3)[:, :2] for data in line.get_data())
        upright = {(float(x[0]), float(y.mean())) for x, y in zip(xs, ys, strict=True) if x[0] == x[1]}
        for row, batch in enumerate(batches):
            memory = gpus.get(card).memory_bytes
            runs = [estimate("llama-7b", seq_len=n, micro_batch_size=batch, gpu=card) for n in lengths]
            fit = [run.process_bytes <= memory for run in runs]
            expected = {i + 0.5 for i in range(2) if fit[i] != fit[i + 1]}
            assert {x for x, y in upright if y == row} == expected


def test_the_timeline_peaks_where_the_ledger_does() -> None:
    made = estimate(MODEL)
    times, states, phases = step_states(made)
    assert times == sorted(times)
    assert {"forward", "backward"} <= {name for name, _, _ in phases}
    assert max(sum(state.values()) for state in states) == pytest.approx(made.allocated_bytes, rel=0.01)
    (ax,) = plot.timeline(made).axes
    assert "GiB" in ax.get_ylabel() and ax.get_xlabel()


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_written_in_the_format_of_its_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    assert app.run(["plot", MODEL, "--over", "rank=4,8", "-o", str(path)]) == 0
    assert path.read_bytes().startswith(magic)


@pytest.mark.parametrize(
    "flags",
    ["-o a.png", "--over rank=4 --timeline -o a.png", "--over rank=4", "--over rank=4 -o a.gif",
     "--over rank=4 -o no/a.png",
     "--over rank=4 --tier all -o a.png", "--over rank=4 --style none -o a.png", "--over rank=4 --over rank=8 -o a.png",
     "--over rank=4 --methods lora,qlora --stacked -o a.png", "--over method=lora --methods lora -o a.png",
     "--timeline --methods lora -o a.png", "--method full --over rank=4 -o a.png",
     "--over rank=4 --capacity x -o a.png", "--over rank=4 --json -o -", "--timeline --tier allocated -o a.png",
     "--timeline --capacity h200 -o a.png", "--timeline --stacked -o a.png",
     "--over rank=4 --over seq_len=64 --stacked -o a.png", "--over rank=4 --over seq_len=64 --methods lora -o a.png"],
)  # fmt: skip
def test_what_cannot_be_drawn_is_bad_input(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run(["plot", MODEL, *flags.split()]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_a_picture_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["plot", MODEL, "--over", "rank=4,8", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [p["process_bytes"] for p in points] == [estimate(MODEL, rank=rank).process_bytes for rank in (4, 8)]


def test_a_picture_and_its_numbers_are_of_the_same_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["plot", MODEL, "--over", "rank=4", "--capacity", "rtx-4090", "--json"]) == 0
    (point,) = json.loads(capsys.readouterr().out)["points"]
    assert point["process_bytes"] == estimate(MODEL, rank=4, gpu="rtx-4090").process_bytes


def test_stdout_gets_a_picture_and_nothing_else(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert app.run(["plot", MODEL, "--timeline", "-o", "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert out.startswith(b"\x89PNG") and not err


def test_validation_draws_and_counts_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    validation = validate(MEASURED)
    assert [row.error for row in validation.worst("allocated", 99)] == sorted(
        (row.error for row in validation.rows("allocated")), key=abs, reverse=True
    )
    by_method = validation.by(lambda run: run.method)
    assert sum(tiers["allocated"].num_runs for tiers in by_method.values()) == len(validation.rows("allocated"))
    axes = plot.predicted_against_measured(validation).axes
    assert {"measured, GiB", "predicted, GiB", "error, %"} <= {
        label for ax in axes for label in (ax.get_xlabel(), ax.get_ylabel())
    }
    assert app.run(["validate", str(MEASURED[0]), "--plot", str(tmp_path / "a.png"), "--json"]) == 0
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert json.loads(capsys.readouterr().out)["num_runs"] == len(validation.runs)


def test_files_without_a_finished_run_are_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text("")
    broken.write_text("{")
    for arguments in ([str(empty)], [str(broken)], [str(tmp_path / "none.jsonl")], ["--by", "colour"]):
        assert app.run(["validate", *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_run_that_exceeded_the_card_is_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a limit of its own it is held against what the card has."""
    path = tmp_path / "mine.jsonl"
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
    out = {"phase": "forward", "step": 1, "tried_bytes": 1, "allocated_bytes": 1, "reserved_bytes": 1}
    record = {"case": {"id": "big", "hf_config": config, "config": {"method": "full"}}, "status": "oom", "oom": out}
    header = {"environment": {"gpu": "NVIDIA GeForce RTX 4090", "gpu_total_bytes": 24 * 2**30}}
    path.write_text(json.dumps(header) + "\n" + json.dumps(record) + "\n")
    assert app.run(["validate", str(path)]) == 0
    assert "1 verdict at a limit of memory, 0 false fits" in capsys.readouterr().out
    (verdict,) = validate([str(path)]).comparison.verdicts
    assert (verdict.ran, verdict.predicted_fits, verdict.limit_bytes) == (False, False, 24 * 2**30)
    lines = rendered(row_lines(validate([path])))
    assert re.search(r"big\n    predicted [\d.]+ of 24\.000: does not fit, measured: does not fit", lines)


def test_calibrate_prints_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    measured = sorted((Path(__file__).parent / "data" / "measured").glob("*.jsonl"))
    validation = validate(measured)
    text = rendered(row_lines(validation))
    for run in validation.runs:
        assert f"  {run.record.case.id}\n" in text
    assert len(re.findall(r"^    (?:allocated|reserved|process) ", text, re.MULTILINE)) == len(
        validation.comparison.rows
    )
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("    "))


def test_calibrate_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise MemplanError("no NVIDIA GPU found", hints=["name one with `--gpu rtx-4090`"])

    monkeypatch.setattr(gpus, "detect", none)
    assert app.run(["calibrate", "--quick"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no NVIDIA GPU found\n")
    assert "memplan validate" in err and "--gpu" not in err
    wrong = {
        "three ways": [["--quick", "--full"], [MODEL, "--full"], ["--model", MODEL, "--quick"]],
        "need the MODEL": [["--rank", "8"]],
        "two models": [[MODEL, "--model", "gpt2"]],
        "no NVIDIA GPU": [[MODEL], ["--model", MODEL, "--method", "lora"], [MODEL, "--model", MODEL]],
    }
    for words, lines in wrong.items():
        for arguments in lines:
            assert app.run(["calibrate", *arguments]) == 2
            err = capsys.readouterr().err
            assert words in err and "\nhint: " in err


def test_a_run_of_ones_own_has_an_id_of_its_own(tmp_path: Path) -> None:
    spec = gpus.get("h200")
    card = DetectedGpu(spec, 0, "NVIDIA H200", spec.memory_bytes, spec.memory_bytes, "580")
    many = tuple(f"layers.{i}.q_proj" for i in range(30))
    qlora = {"method": "qlora"}
    runs: list[dict[str, Any]] = [{}, qlora, {**qlora, "seq_len": 2048}, {"rank": 8}, {"target_modules": many}]
    made = [cases_for(card, MODEL, run, quick=False, full=False, seed=0, share=0.9) for run in runs]
    assert [len(cases) for cases in made] == [1] * len(runs)
    assert len({cases[0].id for cases in made}) == len(runs)
