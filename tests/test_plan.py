"""The plan: what is shown is true, nothing shown is beaten, nothing better was left out."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

import memplan
from memplan import gpus
from memplan.cli.app import run
from memplan.cost import cost
from memplan.cost_report import PlanReport
from memplan.errors import MemplanError
from memplan.model_spec import ModelSpec
from memplan.plan import command_of, flags_of, plan, runs_of
from memplan.prices import Price

HOURLY = {"rtx-4090": 0.5, "l40s": 1.2, "a100-80gb": 1.8, "h100-sxm": 2.9}
CARDS = tuple(HOURLY)
ROWS = tuple(Price("test", gpu, usd) for gpu, usd in HOURLY.items())
TOKENS = 10_000_000


@pytest.fixture(scope="module")
def made() -> memplan.Plan:
    return plan("llama-7b", num_tokens=TOKENS, gpu_names=CARDS, price_rows=ROWS, total_batch_size=4)


# Few layers, as wide as a 7B's: on small cards some runs fit and some do not, and trying them all is quick.
SHALLOW = ModelSpec.from_hf_config({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 128256})
SMALL_CARDS = {"rtx-3060": 0.1, "rtx-4080": 0.25, "rtx-4090": 0.5, "l40s": 1.2, "h100-sxm": 2.9}
SMALL_ROWS = tuple(Price("test", gpu, usd) for gpu, usd in SMALL_CARDS.items())


def everything(said: dict) -> tuple[list[tuple], int]:
    """Every method, GPU, micro-batch and checkpointing by itself, through the public functions alone: those that fit,
    and how many do not."""
    found, num_too_large = [], 0
    for method, configs in runs_of(said, ("full", "lora", "qlora"), 8).items():
        for config in configs:
            for gpu in SMALL_CARDS:
                each = cost(SHALLOW, config, gpu=gpu, num_tokens=TOKENS, price_rows=SMALL_ROWS)
                if each.fits:
                    found.append((each.dollars, each.hours, method, gpu, config, each.process_bytes))
                else:
                    num_too_large += 1
    return found, num_too_large


@pytest.mark.parametrize("said", [{}, {"stack": "torch", "seq_len": 3000}], ids=["trl", "torch"])
def test_the_front_is_that_of_the_whole_search(said: dict) -> None:
    """Pruning leaves nothing out: the same front comes from trying everything."""
    asked = {"num_tokens": TOKENS, "gpu_names": list(SMALL_CARDS), "price_rows": SMALL_ROWS, "total_batch_size": 8}
    made = plan(SHALLOW, said, **asked)
    found, num_too_large = everything(said)
    assert min(len(found), num_too_large) > 20
    best: list[tuple] = []
    for row in sorted(found, key=lambda row: row[:4]):
        if not best or row[1] < best[-1][1]:
            best.append(row)
    assert len(best) > 1
    assert [(c.dollars, c.hours, c.method, c.gpu, c.config, c.process_bytes) for c in made.front] == best


def test_counts_of_gpus_are_not_offered(made: memplan.Plan) -> None:
    """Data parallel is not modelled; the price of an instance of several is shared, and that is said."""
    assert any("training on several is not modelled" in line for line in made.assumptions)
    assert not any("at a time" in line for line in made.assumptions)
    rows = [Price("many", "h200", 24.0, count=8)]
    shared = plan("qwen3-0.6b", num_tokens=TOKENS, gpu_names=["h200"], price_rows=rows, methods=["lora"])
    assert shared.front[0].dollars == pytest.approx(shared.front[0].hours * 3.0)
    assert any("many rents out h200 8 at a time" in line for line in shared.assumptions)


def test_the_front_is_cheapest_first_and_each_row_buys_time(made: memplan.Plan) -> None:
    assert made.front
    for cheaper, faster in pairwise(made.front):
        assert cheaper.dollars < faster.dollars
        assert cheaper.hours > faster.hours
    assert (made.cheapest, made.fastest) == (made.front[0], made.front[-1])
    assert made.recommended in made.front
    assert made.recommended.dollars * made.recommended.hours == min(c.dollars * c.hours for c in made.front)


def test_what_is_shown_is_the_true_estimate_and_cost(made: memplan.Plan) -> None:
    for c in {*made.front, *made.best.values()}:
        assert c.fits
        assert c.process_bytes <= c.memory_bytes == gpus.get(c.gpu).memory_bytes
        assert c.process_bytes == memplan.estimate("llama-7b", c.config, gpu=c.gpu).process_bytes
        truth = cost("llama-7b", c.config, gpu=c.gpu, num_tokens=TOKENS, price_rows=ROWS)
        assert (c.hours, c.dollars, c.interval) == (truth.hours, truth.dollars, truth.interval)
        assert c.config.micro_batch_size * c.config.gradient_accumulation_steps == 4


def test_every_method_and_gpu_is_shown_or_has_a_reason(made: memplan.Plan) -> None:
    shown = {(c.gpu, c.method) for c in made.front}
    reasons = {(row.gpu, row.method): row.reason for row in made.rejected}
    assert shown | set(reasons) == {(gpu, method) for gpu in CARDS for method in ("full", "lora", "qlora")}
    assert not shown & set(reasons)
    assert all(reasons.values())
    assert "does not fit" in reasons["rtx-4090", "full"]


def test_only_a_few_runs_are_played(made: memplan.Plan) -> None:
    assert made.num_configurations == 3 * 2 * 3 * len(CARDS)
    assert 0 < made.num_played <= 12


def test_the_same_question_has_the_same_answer(made: memplan.Plan) -> None:
    again = plan("llama-7b", num_tokens=TOKENS, gpu_names=CARDS[::-1], price_rows=ROWS[::-1], total_batch_size=4)
    assert again.front == made.front
    assert again.best == made.best
    assert plan("llama-7b", num_tokens=TOKENS, gpu_names=CARDS, price_rows=ROWS, total_batch_size=4) == made


def test_the_flags_of_a_row_mean_that_row(made: memplan.Plan, capsys: pytest.CaptureFixture[str]) -> None:
    for c in made.front:
        price = str(HOURLY[c.gpu])
        assert run(["cost", "llama-7b", *flags_of(c), "--num-tokens", str(TOKENS), "--price", price, "--json"]) == 0
        body = json.loads(capsys.readouterr().out)
        assert (body["hours"], body["dollars"]) == (c.hours, c.dollars)
        assert command_of(c).split() == list(flags_of(c))


def test_limits_cut_the_front(made: memplan.Plan) -> None:
    cheapest, fastest = made.cheapest, made.fastest
    inside = plan(
        "llama-7b", num_tokens=TOKENS, gpu_names=CARDS, price_rows=ROWS, total_batch_size=4, max_usd=cheapest.dollars
    )
    assert inside.front == (cheapest,)
    assert any("over --max-usd" in row.reason for row in inside.rejected)
    quick = plan(
        "llama-7b", num_tokens=TOKENS, gpu_names=CARDS, price_rows=ROWS, total_batch_size=4, max_hours=fastest.hours
    )
    assert quick.front == (fastest,)
    none = plan("llama-7b", num_tokens=TOKENS, gpu_names=CARDS, price_rows=ROWS, max_usd=1e-6)
    assert (none.front, none.cheapest, none.recommended, none.best) == ((), None, None, {})
    assert len(none.rejected) == 3 * len(CARDS)


def test_what_is_given_is_kept() -> None:
    kept = plan(
        "llama-7b",
        num_tokens=TOKENS,
        methods=["lora"],
        gpu_names=["h200"],
        price=3.0,
        micro_batch_size=2,
        gradient_checkpointing=True,
        rank=64,
        seq_len=2048,
    )
    (only,) = kept.front
    assert (only.config.rank, only.config.seq_len, only.config.micro_batch_size) == (64, 2048, 2)
    assert only.config.gradient_checkpointing
    assert only.config.gradient_accumulation_steps == 8
    assert kept.num_configurations == 1


def test_fields_of_one_method_leave_the_others_alone() -> None:
    runs = runs_of({"rank": 8, "double_quant": False}, ("full", "lora", "qlora"), 2)
    assert {c.rank for c in runs["full"]} == {None}
    assert {c.rank for c in runs["lora"] + runs["qlora"]} == {8}
    assert {c.double_quant for c in runs["qlora"]} == {False}


def test_gpus_without_bf16_or_price_are_named() -> None:
    rows = (Price("test", "t4", 0.3), Price("test", "h200", 3.0))
    found = plan("qwen3-0.6b", num_tokens=10**6, price_rows=rows, gpu_names=["t4", "h200", "l4"], methods=["lora"])
    reasons = {row.gpu: row.reason for row in found.rejected}
    assert "no bf16" in reasons["t4"]
    assert reasons["l4"] == "no price"
    assert [c.gpu for c in found.front] == ["h200"]
    assert any("never measured" in line for line in found.assumptions) == (found.front[0].gpu != "h200")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0}, "num_tokens"),
        ({"max_usd": 0}, "max_usd"),
        ({"max_hours": -1}, "max_hours"),
        ({"methods": ["lora", "prompt"]}, "unknown method `prompt`"),
        ({"methods": []}, "no method"),
        ({"gpu_names": ["rtx-9090"]}, "unknown GPU"),
        ({"gpu_names": []}, "no GPU"),
        ({"total_batch_size": 0}, "total_batch_size"),
        ({"micro_batch_size": 3}, "no multiple"),
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"gradient_accumulation_steps": 4}, "follows from"),
        ({"provider": "nobody"}, "unknown provider"),
        ({"price": 2.0, "gpu_names": ["h200", "l4"]}, "one price for several"),
        ({"rank": -1}, "rank"),
        ({"bogus": 1}, "bogus"),
    ],
)
def test_bad_input_is_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(MemplanError, match=message) as raised:
        plan("qwen3-0.6b", **{"num_tokens": 10**6, **arguments})
    assert "\n" not in raised.value.message


def test_the_command_in_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prices.csv"
    file.write_text("gpu,usd_per_hour\n" + "".join(f"{gpu},{usd}\n" for gpu, usd in HOURLY.items()), encoding="utf-8")
    arguments = ["plan", "qwen3-0.6b", "--num-tokens", "1M", "--prices", str(file), "--gpus", ",".join(CARDS)]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(word in out for word in ("cheapest", "fastest", "take this", "why not the others", "--method"))
    first = out.partition("  1. memplan ")[2].partition("\n\n")[0].partition("  2. ")[0]
    first, num_continued = re.subn(r"\\\n", "", first)
    assert num_continued and "\n" not in first.strip()
    assert run(shlex.split(first)) == 0  # the row's command, as a shell takes it from there
    shown = capsys.readouterr().out
    assert re.search(r"^ +1\. +(\S+)", out, re.MULTILINE)[1] in shown  # at the same price
    assert run([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    body = PlanReport.model_validate_json(out)
    assert err == ""
    assert body.front[body.cheapest].dollars == min(c.dollars for c in body.front)
    assert body.front[body.fastest].hours == min(c.hours for c in body.front)


@pytest.mark.parametrize(
    "arguments",
    [
        "plan llama-7b",
        "plan llama-7b --num-tokens many",
        "plan llama-7b --num-tokens 1M --methods lora,prompt",
        "plan llama-7b --num-tokens 1M --gpus h300",
        "plan llama-7b --num-tokens 1M --live",
        "plan llama-7b --num-tokens 1M --max-usd 0",
        "plan llama-7b --num-tokens 1M --gpus h200 --prices missing.csv",
    ],
)
def test_bad_command_lines_exit_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_the_front_can_be_drawn(made: memplan.Plan, tmp_path: Path) -> None:
    from memplan.plot import plan_front

    (axes,) = plan_front(made).axes
    names = {text.get_text().removesuffix(" (take this)") for text in axes.texts}
    assert names >= {c.gpu for c in made.front}
    assert any(text.get_text() == f"{made.recommended.gpu} (take this)" for text in axes.texts)
    with pytest.raises(MemplanError, match="nothing to draw"):
        plan_front(plan("qwen3-0.6b", num_tokens=TOKENS, gpu_names=["h200"], price=3.0, max_usd=1e-9))


def test_the_command_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "qwen3-0.6b",
        "--num-tokens",
        "1M",
        "--gpus",
        "h200",
        "--price",
        "3",
        "--methods",
        "lora",
        "--plot",
    ]
    assert run([*arguments, str(tmp_path / "front.png")]) == 0
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert run([*arguments, str(tmp_path / "front.doc")]) == 2
    assert run([*arguments, str(tmp_path / "no" / "front.png")]) == 2
    assert "error: " in capsys.readouterr().err
