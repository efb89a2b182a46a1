"""Hours and dollars: arithmetic by hand, datasets, prices, bounds, and every way to say it wrong."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memplan
from memplan import gpus
from memplan.cli.amounts import parse_count
from memplan.cli.app import run
from memplan.cost import amount_of, bounds, cost
from memplan.cost_report import CostReport
from memplan.dataset import TokenCounts, count_tokens
from memplan.errors import MemplanError, UnknownNameError
from memplan.prices import Price
from memplan.storage import storage
from memplan.timing.model import step_time
from memplan.timing.roofline import shipped
from memplan.train_config import TrainConfig
from memplan.units import dollars_text, hours_text

SMALL = "qwen3-0.6b"


def test_hours_and_dollars_follow_from_the_step() -> None:
    found = cost("llama-7b", gpu="h200", num_tokens=50_000_000, price=2.49, method="lora", micro_batch_size=4)
    step = step_time(memplan.estimate("llama-7b", method="lora", micro_batch_size=4), gpus.get("h200"))
    assert found.num_steps == math.ceil(50_000_000 / (4 * 1024))
    assert found.step_seconds == step.step_seconds
    assert found.hours == pytest.approx(found.num_steps * step.step_seconds / 3600)
    assert found.dollars == pytest.approx(found.hours * 2.49)
    assert found.tokens_per_second * found.hours * 3600 == pytest.approx(50_000_000)
    assert found.interval[0] < found.hours < found.interval[1]
    assert found.dollars_interval == pytest.approx(tuple(h * 2.49 for h in found.interval))
    assert found.fits
    assert found.measured_on_this_gpu
    assert (
        found.process_bytes == memplan.estimate("llama-7b", method="lora", micro_batch_size=4, gpu="h200").process_bytes
    )


def test_samples_are_rows_and_epochs_repeat_them() -> None:
    config = TrainConfig(method="lora", micro_batch_size=4, gradient_accumulation_steps=2, seq_len=512)
    amount = amount_of(config, num_samples=1000, epochs=2.5)
    assert (amount.num_steps, amount.num_tokens, amount.seq_len) == (math.ceil(2500 / 8), 2500 * 512, 512)
    assert amount_of(config, num_tokens=1).num_steps == 1


def test_a_gpu_never_measured_says_so_and_is_less_certain() -> None:
    measured = cost("llama-7b", gpu="h200", num_tokens=10**7)
    other = cost("llama-7b", gpu="h100-sxm", num_tokens=10**7)
    assert not other.measured_on_this_gpu
    assert any("never measured on this GPU" in line for line in other.assumptions)
    assert not any("never measured" in line for line in measured.assumptions)

    def width(found: memplan.Cost) -> float:
        return math.log(found.interval[1] / found.interval[0])

    assert width(other) >= width(measured) * 0.99


def test_bounds_of_an_unmeasured_gpu_hold_the_peaks_floor() -> None:
    card = gpus.get("a100-80gb")
    time = step_time(memplan.estimate("llama-7b", method="full", stack="torch", micro_batch_size=8), card)
    (low, high), _ = bounds(10.0, time, card, shipped())
    assert low * high == pytest.approx(100.0)
    assert low <= 10.0 * (1 - shipped().held_out["p90"])
    assert low >= 10.0 * time.floor_seconds / time.step_seconds * 0.999 or low == pytest.approx(
        10.0 * (1 - shipped().held_out["p90"])
    )


def test_the_price_is_the_lowest_and_its_age_is_told() -> None:
    rows = [
        Price("dear", "h200", 9.0),
        Price("cheap", "h200", 16.0, count=8, as_of=datetime.date(2026, 11, 1)),
        Price("spot", "h200", 0.5, kind="spot"),
    ]
    found = cost(SMALL, gpu="h200", num_tokens=10**6, price_rows=rows)
    assert found.price is rows[1]
    assert found.dollars == pytest.approx(found.hours * 2.0)
    assert any("as of 2026-11-01" in line for line in found.assumptions)
    assert any("8 at a time for $16.00" in line for line in found.assumptions)
    assert cost(SMALL, gpu="h200", num_tokens=10**6, price_rows=rows, kind="spot").price is rows[2]
    assert cost(SMALL, gpu="h200", num_tokens=10**6, price_rows=rows, provider="dear").price is rows[0]


def test_without_a_price_there_are_hours_but_no_dollars() -> None:
    found = cost(SMALL, gpu="h200", num_tokens=10**6, price_rows=[Price("x", "l4", 1.0)])
    assert (found.dollars, found.dollars_interval, found.price) == (None, None, None)
    assert any("no on-demand price for `h200`" in line for line in found.assumptions)


def test_a_card_of_ones_own_costs_its_power() -> None:
    found = cost(SMALL, gpu="rtx-4090", num_tokens=10**6, usd_per_kwh=0.30)
    assert found.dollars == pytest.approx(found.hours * 0.450 * 0.30)  # 450 W, NVIDIA's figure for the card
    assert any("450 W" in line for line in found.assumptions)


def test_what_does_not_fit_is_told_to_cost_all_the_same() -> None:
    found = cost("llama-7b", gpu="rtx-4090", num_tokens=10**6, method="full", price=1.0)
    assert not found.fits
    assert found.hours > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "how much"),
        ({"num_tokens": 0}, "above zero"),
        ({"num_tokens": -5}, "above zero"),
        ({"num_samples": 0}, "above zero"),
        ({"num_samples": 10, "epochs": 0}, "epochs"),
        ({"num_samples": 10, "epochs": float("nan")}, "epochs"),
        ({"num_tokens": 5, "num_samples": 5}, "both say"),
        ({"num_tokens": 5, "epochs": 3}, "epochs"),
        ({"num_tokens": 5, "price": -1.0}, "price must be above zero"),
        ({"num_tokens": 5, "price": float("inf")}, "price must be above zero"),
        ({"num_tokens": 5, "price": 1.0, "usd_per_kwh": 0.3}, "both given"),
        ({"num_tokens": 5, "usd_per_kwh": 0.0}, "kWh must be above zero"),
        ({"num_tokens": 5, "provider": "nobody"}, "unknown provider `nobody`"),
        ({"num_tokens": 5, "gpu": "h300"}, "unknown GPU"),
        ({"num_tokens": 5, "gpu": "24GiB"}, "peaks of `24GiB`"),
        ({"num_tokens": 5, "dataset": "missing.jsonl"}, "both say|missing.jsonl"),
        ({"dataset": "missing.jsonl"}, "missing.jsonl: No such file"),
        ({"num_tokens": 5, "price_rows": "missing.csv"}, "missing.csv: No such file"),
        ({"num_tokens": 5, "method": "lora", "rank": 0}, "rank"),
    ],
)
def test_bad_input_is_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(MemplanError, match=message) as raised:
        cost(SMALL, **{"gpu": "h200", **arguments})
    assert "\n" not in raised.value.message


def test_a_bad_line_of_a_price_list_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("gpu,usd_per_hour\nh200,3\nrtx-4090,-1\n", encoding="utf-8")
    with pytest.raises(MemplanError, match=r"mine\.csv: line 3: usd_per_hour `-1`"):
        cost(SMALL, gpu="h200", num_tokens=5, price_rows=str(file))


# Datasets


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "characters"),
    [
        ({"text": "x" * 40}, 40),
        ({"messages": [{"role": "user", "content": "x" * 15}, {"role": "assistant", "content": "y" * 24}]}, 40),
        ({"conversations": [{"from": "human", "value": "x" * 20}, {"from": "gpt", "value": "y" * 19}]}, 40),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 40}]}]}, 40),
        ({"prompt": "x" * 20, "completion": "y" * 19}, 40),
        ({"prompt": [{"role": "user", "content": "x" * 20}], "completion": [{"content": "y" * 19}]}, 40),
        ({"instruction": "x" * 10, "input": "", "output": "y" * 28, "id": 7}, 40),
        ({"question": "x" * 19, "answer": "y" * 20}, 40),
        ("x" * 40, 40),
    ],
)
def test_the_usual_shapes_of_an_example_are_read(tmp_path: Path, row: object, characters: int) -> None:
    counts = count_tokens(lines(tmp_path / "a.jsonl", row), chars_per_token=4)
    assert counts.lengths == ((characters // 4, 1),)
    assert "4 characters a token" in counts.rule


def test_lengths_are_counted_cut_and_padded(tmp_path: Path) -> None:
    rows = [{"text": "x" * 4 * n} for n in (10, 10, 30, 100)]
    counts = count_tokens(lines(tmp_path / "a.jsonl", *rows))
    assert (counts.num_samples, counts.num_tokens, counts.longest) == (4, 150, 100)
    assert counts.num_longer_than(50) == 1
    assert counts.truncated(50).num_tokens == 100
    assert counts.padded_length(1) == pytest.approx(150 / 4)
    # of two drawn at random: both 10 in 1 of 4, at most 30 in 9 of 16
    assert counts.padded_length(2) == pytest.approx(10 * 4 / 16 + 30 * 5 / 16 + 100 * 7 / 16)


@given(
    st.dictionaries(st.integers(1, 500), st.integers(1, 50), min_size=1, max_size=20),
    st.integers(1, 64),
    st.integers(1, 600),
)
def test_padding_lies_between_the_mean_and_the_longest(histogram: dict[int, int], batch: int, seq_len: int) -> None:
    counts = TokenCounts("x", tuple(sorted(histogram.items())), "rule")
    cut = counts.truncated(seq_len)
    mean = cut.num_tokens / cut.num_samples
    assert mean - 1e-9 <= cut.padded_length(batch) <= min(counts.longest, seq_len) + 1e-9
    assert cut.padded_length(batch) <= cut.padded_length(batch + 1) + 1e-9
    assert cut.num_samples == counts.num_samples


def test_a_dataset_is_timed_at_its_padded_length(tmp_path: Path) -> None:
    rows = [{"text": "x" * 4 * n} for n in (100, 300)] * 50
    file = lines(tmp_path / "a.jsonl", *rows)
    found = cost(
        SMALL, gpu="h200", dataset=str(file), epochs=2, price=1.0, method="lora", micro_batch_size=2, seq_len=256
    )
    assert found.num_tokens == 2 * 50 * (100 + 256)
    assert found.num_steps == 100
    padded = math.ceil(100 / 4 + 256 * 3 / 4)
    step = step_time(memplan.estimate(SMALL, method="lora", micro_batch_size=2, seq_len=padded), gpus.get("h200"))
    assert found.step_seconds == step.step_seconds
    assert found.config.seq_len == 256
    assert any("50 examples are cut to 256 tokens" in line for line in found.assumptions)


def test_a_tokenizer_counts_where_there_is_one(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    file = lines(tmp_path / "a.jsonl", {"text": "a b a"}, {"text": "a"})
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        assert count_tokens(file, tokenizer=where).lengths == ((1, 1), (3, 1))
    (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MemplanError, match="no tokenizer can be read"):
        count_tokens(file, tokenizer=tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "ok"}\n{"text": ', "line 2: not JSON: expecting value at character 10"),
        ('{"text": "ok"}\n\n[1, 2]', "line 3: not an object"),
        ('{"body": "ok"}', "line 1: none of .* but `body`"),
        ('{"text": null}', "line 1: none of"),
        ("", "no tokens"),
        ('{"text": ""}', "no tokens"),
    ],
)
def test_a_bad_dataset_is_named_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(MemplanError, match=message):
        count_tokens(tmp_path / "a.jsonl")


def test_a_key_of_ones_own_and_files_that_are_no_text(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"body": "x" * 8})
    assert count_tokens(file, text_field="body").num_tokens == 2
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MemplanError, match="not UTF-8"):
        count_tokens(tmp_path / "b.jsonl")
    with pytest.raises(MemplanError, match="Is a directory"):
        count_tokens(tmp_path)
    with pytest.raises(MemplanError, match="characters per token"):
        count_tokens(file, chars_per_token=0, text_field="body")


# Storage


def test_adapters_are_kept_beside_one_base() -> None:
    kept = storage("llama-7b", method="lora", rank=16, num_variants=100)
    assert kept.base_bytes == 2 * 6_738_415_616  # bf16, the published count
    assert kept.adapter_bytes == 4 * 39_976_960  # fp32 adapters of rank 16 on all linear layers, as measured
    assert kept.full_copies_bytes == 100 * kept.base_bytes
    assert kept.adapters_bytes == kept.base_bytes + 100 * kept.adapter_bytes
    assert storage("llama-7b", method="full", stack="torch", num_variants=2).adapter_bytes == kept.adapter_bytes
    with pytest.raises(MemplanError, match="num_variants"):
        storage(SMALL, num_variants=0)


# The command


@pytest.mark.parametrize(
    ("text", "number"),
    [("50M", 50_000_000), ("1.5B", 1_500_000_000), ("20_000", 20_000), ("7", 7), ("2k", 2000), ("3T", 3 * 10**12)],
)
def test_counts_are_read_as_people_write_them(text: str, number: int) -> None:
    assert parse_count(text, "--num-tokens") == number


@pytest.mark.parametrize("text", ["", "M", "abc", "-5M", "0", "nan", "inf", "1e400", "5X"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(MemplanError, match="--num-tokens"):
        parse_count(text, "--num-tokens")


def test_hours_and_dollars_in_words() -> None:
    assert [hours_text(h) for h in (0.001, 0.5, 3.26, 250)] == ["4 s", "30 min", "3.3 h", "10.4 days"]
    assert [dollars_text(d) for d in (None, 0, 0.001, 0.5, 12345.6)] == [
        "no price",
        "$0.00",
        "<$0.01",
        "$0.50",
        "$12,346",
    ]


def test_the_command_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "llama-7b --gpu h100-sxm --num-tokens 50M --price 2.49 --method qlora --variants 3 --json"
    assert run(["cost", *arguments.split()]) == 0
    out, err = capsys.readouterr()
    body = json.loads(out)
    assert err == ""
    assert CostReport.model_validate(body).hours == pytest.approx(
        cost("llama-7b", gpu="h100-sxm", num_tokens=50_000_000, price=2.49, method="qlora").hours
    )
    assert (body["schema_version"], body["command"], body["storage"]["num_variants"]) == (1, "cost", 3)
    assert body["price"]["usd_per_gpu_hour"] == 2.49


def test_the_command_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "llama-7b --gpu rtx-4090 --num-tokens 50M --own --kwh 0.3 --method full"
    assert run(["cost", *arguments.split()]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "does not fit" in out
    assert "bound by" in out


@pytest.mark.parametrize(
    "arguments",
    [
        "cost llama-7b --num-tokens 5M",
        "cost llama-7b --gpu h200",
        "cost llama-7b --gpu h200 --num-tokens 0",
        "cost llama-7b --gpu h200 --num-tokens 5M --price -2",
        "cost llama-7b --gpu h200 --num-tokens 5M --own",
        "cost llama-7b --gpu h200 --num-tokens 5M --kwh 0.3",
        "cost llama-7b --gpu h200 --num-tokens 5M --prices missing.csv",
        "cost llama-7b --gpu h200 --num-tokens 5M --prices a.csv --live",
        "cost llama-7b --gpu h200 --num-tokens 5M --provider nobody",
        "cost llama-7b --gpu h200 --num-samples 5 --variants 0",
        "cost llama-9b --gpu h200 --num-tokens 5M",
    ],
)
def test_bad_command_lines_exit_2_with_one_error_line(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert "Traceback" not in err


def test_the_nearest_provider_is_suggested() -> None:
    with pytest.raises(UnknownNameError) as raised:
        cost(SMALL, gpu="h200", num_tokens=5, provider="nebus")
    assert raised.value.near == ("nebius",)
