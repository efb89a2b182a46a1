"""The command, through `run`, the same path as the console script."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memplan import TrainConfig, estimate
from memplan.cli import app
from memplan.cli.compare import comparison_lines
from memplan.cli.estimate import estimate_lines
from memplan.cli.explain import explanation
from memplan.cli.fit import card_lines, fit_lines
from memplan.cli.options import RUN_OPTIONS, fields_of
from memplan.cli.output import rendered
from memplan.compare import compare
from memplan.fit import fit

MODEL = "smollm2-135m"
TRACED = Path(__file__).parent / "data" / "traced" / "h200.jsonl"
ESCAPE = "\x1b"


class Result:
    """What a command did."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


Memplan = Callable[..., Result]


@pytest.fixture
def memplan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Memplan:
    for name in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "MEMPLAN_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        status = app.run(arguments)
        return Result(status, *capsys.readouterr())

    return run


def test_python_runs_the_package() -> None:
    done = subprocess.run([sys.executable, "-m", "memplan", "gpus", "--at-least", "24"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "memplan.cli.app", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_estimate_names_run_parts_phases_and_tiers(memplan: Memplan) -> None:
    result = memplan("estimate", MODEL, "--method", "qlora", "--rank", "16")
    assert (result.status, result.err) == (0, "")
    run = estimate(MODEL, method="qlora", rank=16)
    for words in (*run.components, *("load", "forward", "backward", "optimizer"), "allocated", "reserved", "process"):
        assert words.replace("_", " ") in result.out
    assert f"{run.num_trainable_params:,} trained" in result.out
    assert f"({run.process_bytes / 1e9:.2f} GB)" in result.out
    assert f"alive at the peak ({run.peak_phase})" in result.out
    assert run.runtime.basis in result.out


def test_estimate_shows_every_assumption_and_stars_those_not_given(memplan: Memplan) -> None:
    out = memplan("estimate", MODEL, "--method", "qlora", "--seq-len", "512").out
    for name in TrainConfig.model_fields:
        assert name.replace("_", "-") in out
    assert re.search(r"seq-len 512( |\n)", out)
    assert "micro-batch-size 1*" in out
    assert re.search(r"method +qlora( |\n)", out)


def test_estimate_leaves_out_what_the_method_has_no_use_for(memplan: Memplan) -> None:
    out = memplan("estimate", MODEL, "--method", "full").out
    assert "quant-type" not in out
    assert "rank" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("estimate", MODEL),
        ("estimate", MODEL, "--method", "full", "--stack", "torch", "--gpu", "rtx-4090"),
        ("estimate", "llama-3.1-405b", "--method", "full", "--seq-len", "131072"),
        ("estimate", MODEL, "--target-modules", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"),
        ("estimate", MODEL, "--method", "qlora", "--explain"),
        ("compare", MODEL, "--gpu", "t4"),
        ("compare", "llama-3.1-405b"),
        ("compare", "deepseek-r1-distill-llama-70b"),
        ("estimate", "llama-7b", "--method", "qlora", "--explain"),
        ("fit", MODEL),
        ("fit", "llama-3-8b", "--gpu", "rtx-4080"),
        ("cost", MODEL, "--gpu", "h200", "--num-tokens", "1M", "--price", "2", "--variants", "3"),
        ("plan", MODEL, "--num-tokens", "1M", "--gpus", "a100-80gb-pcie,rtx-4090", "--methods", "full,lora"),
        ("validate", str(TRACED), "--components"),
        ("plot", "-h"),
        ("models",),
        ("models", "show", "gemma-3-4b"),
        ("gpus",),
        ("--help",),
        ("estimate", "--help"),
        ("compare", "--help"),
        ("models", "show", "-h"),
        ("gpus", "-h"),
    ],
)
def test_no_line_is_wider_than_a_terminal(memplan: Memplan, arguments: tuple[str, ...]) -> None:
    result = memplan(*arguments)
    assert result.status == ("does not fit:" in result.out)
    assert ESCAPE not in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_estimate_fits_one_screen(memplan: Memplan) -> None:
    assert len(memplan("estimate", MODEL, "--method", "qlora", "--gpu", "rtx-4090").out.splitlines()) <= 42


def test_estimate_says_whether_the_named_gpu_has_the_memory(memplan: Memplan) -> None:
    assert "GiB to spare" in memplan("estimate", MODEL, "--gpu", "h200").out
    assert "GiB short" in memplan("estimate", "llama-2-70b", "--method", "full", "--gpu", "h200").out


def test_json_is_one_document_with_the_numbers_of_python(memplan: Memplan) -> None:
    result = memplan("estimate", MODEL, "--rank", "8", "--gpu", "rtx-4090", "--json")
    document, run = json.loads(result.out), estimate(MODEL, rank=8, gpu="rtx-4090")
    assert result.err == ""
    for name in ("allocated_bytes", "reserved_bytes", "process_bytes", "num_trainable_params", "adapter_bytes"):
        assert document[name] == getattr(run, name)
    assert document["components"] == run.components


@pytest.mark.parametrize(
    "arguments",
    [("compare", MODEL), ("models",), ("models", "show", MODEL), ("gpus",), ("estimate", MODEL, "--explain")],
)
def test_every_command_prints_json(memplan: Memplan, arguments: tuple[str, ...]) -> None:
    result = memplan(*arguments, "--json")
    assert json.loads(result.out)["schema_version"] == 1
    assert (result.status, result.err) == (0, "")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "says", "hints"),
    [
        (("estimate", "lama-7b"), "unknown model `lama-7b`", "`llama-7b`"),
        (("estimate", MODEL, "--gpu", "rtx-4091"), "unknown GPU", "`rtx-4090`"),
        (("estimate", MODEL, "--gpu", "24"), "no unit", "`24GiB`"),
        (("estimate", MODEL, "--gpu", "a100"), "ambiguous", "a100-80gb"),
        (("estimate", MODEL, "--optimizer", "adamw_torc"), "unknown optimizer", "`adamw_torch`"),
        (("estimate", MODEL, "--method", "full", "--rank", "8"), "`rank` has no meaning", "`lora`"),
        (("estimate", MODEL, "--rank", "0"), "rank", ""),
        (("estimate", MODEL, "--rank", "-1"), "rank", ""),
        (("estimate", MODEL, "--seq-len", "99999999999999"), "seq_len", ""),
        (("estimate", MODEL, "--rank", "many"), "--rank", "memplan estimate -h"),
        (("estimate", MODEL, "--method", "lora2"), "'qlora'", "`lora`"),
        (("estimate", MODEL, "--target-modules", "lm_head"), "`lm_head`", "`trainer`"),
        (("estimate", MODEL, "--target-modules", "c_attn"), "gets an adapter", "`all-linear`"),
        (("estimate", "qwen3-30b-a3b", "--target-modules", "gate_proj"), "lacks `up_proj`", "both projections"),
        (("estimate", "bloom-560m", "--attention", "flash_attention_2"), "no flash", "eager"),
        (("estimate", MODEL, "--methd", "lora"), "no such option", "`--method`"),
        (("estimate", MODEL, "--autocast", "--no-autocast"), "exclude each other", ""),
        (("estimate", MODEL, "--target-modules", ""), "at least one module", ""),
        (("estimate", MODEL, "--allocator", "nonsense:1"), "nonsense", ""),
        (("estimate",), "missing argument", "memplan estimate -h"),
        (("estmate", MODEL), "no such command", "`estimate`"),
        (("compare", MODEL, "--variants", "0"), "--variants", ""),
        (("compare", MODEL, "--method", "lora"), "no such option", ""),
        (("models", "--family", "lama"), "unknown family", "`llama`"),
        (("models", "show", "nothing-like-it"), "unknown model", "memplan models"),
        (("gpus", "--at-least", "24"), "no unit", "24GiB"),
    ],
)
def test_bad_input_is_one_line_with_a_hint(memplan: Memplan, arguments: tuple[str, ...], says: str, hints: str) -> None:
    result = memplan(*arguments)
    lines = result.err.splitlines()
    assert result.status == 2
    assert result.out == ""
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert lines[1:]
    assert all(line.startswith("hint: ") for line in lines[1:])
    assert hints in "\n".join(lines[1:])


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\x00\xff\xfe", b'{"model_type": "llama"', b'{"model_type": 7}']
)
def test_broken_config_files_are_bad_input(memplan: Memplan, tmp_path: Any, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    result = memplan("estimate", str(path))
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err


def test_a_config_file_and_its_folder_are_models(memplan: Memplan, tmp_path: Any) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 256}  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    by_file, by_folder = (memplan("estimate", str(where), "--json").out for where in (path, tmp_path))
    assert json.loads(by_file)["allocated_bytes"] == json.loads(by_folder)["allocated_bytes"]


def test_a_bug_is_no_verdict(memplan: Memplan, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing\nat all")

    monkeypatch.setattr(sys.modules["memplan.estimate"], "estimate", broken)
    result = memplan("estimate", MODEL)
    assert result.status == 101
    assert result.err.startswith("error: a bug in memplan: ZeroDivisionError: by nothing\nhint: ")
    assert "Traceback" not in result.err
    monkeypatch.setenv("MEMPLAN_DEBUG", "1")
    result = memplan("estimate", MODEL)
    assert result.status == 101
    assert "Traceback" in result.err


def test_ctrl_c_is_130(memplan: Memplan, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["memplan.estimate"], "estimate", interrupted)
    assert memplan("estimate", MODEL).status == 130


# Options


def test_every_field_of_a_run_is_an_option() -> None:
    assert {name.removeprefix("no_") for name in RUN_OPTIONS} == set(TrainConfig.model_fields)


OTHER_VALUES = {
    "method": "qlora",
    "stack": "torch",
    "rank": "4",
    "target_modules": "q_proj,v_proj",
    "lora_dropout": "0.25",
    "modules_to_save": "lm_head",
    "adapter_dtype": "bf16",
    "quant_type": "fp4",
    "micro_batch_size": "3",
    "seq_len": "384",
    "gradient_accumulation_steps": "2",
    "attention": "eager",
    "weight_dtype": "fp32",
    "optimizer": "adamw_torch",
    "loss": "full",
    "max_grad_norm": "0.5",
}


@pytest.mark.parametrize("name", RUN_OPTIONS)
def test_an_option_reaches_its_field(memplan: Memplan, name: str) -> None:
    field, option = name.removeprefix("no_"), f"--{name.replace('_', '-')}"
    value = [OTHER_VALUES[name]] if name in OTHER_VALUES else []
    others = [] if name == "method" else ["--method", "qlora"]
    others += ["--stack", "torch"] if name == "loss" else []
    result = memplan("estimate", MODEL, *others, option, *value, "--json")
    assert result.err == ""
    document = json.loads(result.out)
    assert field not in document["assumed"]
    got = document["config"][field]
    if isinstance(got, list):
        assert got == OTHER_VALUES[name].split(",")
    elif isinstance(got, bool):
        assert got is (name == field)
    else:
        assert got == type(got)(OTHER_VALUES[name])


def test_defaults_named_in_help_are_those_of_a_run() -> None:
    named = {
        name: match.group(1)
        for name, annotation in RUN_OPTIONS.items()
        if (match := re.search(r" Default (\S+)\.$", annotation.__metadata__[0].help))
    }
    run = TrainConfig()
    assert len(named) >= 10
    assert named == {
        name: f"{value:g}" if isinstance(value := getattr(run, name), float) else str(value) for name in named
    }


def test_fields_of_keeps_what_was_given() -> None:
    given = {name: None if "bool" not in str(kind) else False for name, kind in RUN_OPTIONS.items()}
    assert fields_of(given) == {}
    assert fields_of({**given, "no_autocast": True, "rank": 0}) == {"autocast": False, "rank": 0}
    assert fields_of({"modules_to_save": "lm_head, embed_tokens"}) == {"modules_to_save": ("lm_head", "embed_tokens")}


# Help, version, completion


def test_help_has_panels_hugging_face_names_and_examples(memplan: Memplan) -> None:
    long, short = memplan("estimate", "--help").out, memplan("estimate", "-h").out
    assert long == short
    for words in ("Method", "Batch", "Memory savers", "Precision", "Device", "Output"):
        assert f"─ {words} ─" in long
    for words in ("per_device_train_batch_size", "attn_implementation", "bnb_4bit_use_double_quant", "Examples:"):
        assert words in long
    assert "…" not in long  # no name cut short


def test_memplan_alone_prints_help_and_is_a_usage_error(memplan: Memplan) -> None:
    result = memplan()
    assert result.status == 2
    assert all(name in result.out for name in app.COMMANDS)


def test_help_of_commands_begins_with_the_summary_in_the_list(memplan: Memplan) -> None:
    listed = " ".join(memplan("--help").out.replace("│", " ").split())
    for name, summary in app.COMMANDS.items():
        assert f"{name} {summary}" in listed
        assert memplan(name, "--help").status == 0


def test_version(memplan: Memplan) -> None:
    result = memplan("--version")
    assert re.fullmatch(r"memplan \d+\.\d+\.\d+\n", result.out)
    assert result.status == 0


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("memplan est", "estimate"),
        ("memplan estimate llama-7", "llama-7b"),
        ("memplan estimate llama-7b --gpu rtx-40", "rtx-4090"),
        ("memplan compare llama-7b --optimizer adamw_torch_f", "adamw_torch_fused"),
        ("memplan plot llama-7b --capacity h200,rtx-40", "h200,rtx-4090"),
        ("memplan plot llama-7b --over seq", "seq_len="),
    ],
)
def test_shell_completion(words: str, offers: str) -> None:
    count = str(len(words.split()) - 1)
    done = process(_MEMPLAN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
    assert offers in done.stdout.split()


# Terminals and pipes


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "memplan.cli.app", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_colour_is_for_terminals_that_want_it(environment: dict[str, str], coloured: bool) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", **environment}
    if "NO_COLOR" not in environment:
        env.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-m", "memplan.cli.app", "gpus", "--at-least", "200GiB"], stdout=theirs, env=env
    ) as done:
        assert done.wait(timeout=60) == 0
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert (ESCAPE in shown) is coloured
    assert "b300" in shown


def test_a_terminal_of_another_encoding_gets_letters_that_it_has() -> None:
    done = process("estimate", MODEL, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0
    assert done.stdout.isascii()
    assert re.search(r"^  weights .* %  -+$", done.stdout, re.MULTILINE)
    assert "lora* | stack trl*" in done.stdout
    assert "?" not in done.stdout


def test_a_pipe_gets_the_same_whatever_the_terminal(memplan: Memplan, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = memplan("estimate", MODEL, "--gpu", "h200").out
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setenv("TERM", "dumb")
    assert memplan("estimate", MODEL, "--gpu", "h200").out == plain
    assert ESCAPE not in plain
    assert not re.search(r" $", plain, re.MULTILINE)


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_can_be_forced(
    memplan: Memplan, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], coloured: bool
) -> None:
    """The words are the same; codes are of the 16 colours and of bold and dim, and none is left on."""
    plain = memplan("estimate", MODEL, "--gpu", "h200").out
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", **environment}.items():
        monkeypatch.setenv(name, value)
    shown = memplan("estimate", MODEL, "--gpu", "h200").out
    codes = {code for found in re.findall(rf"{ESCAPE}\[([\d;]*)m", shown) for code in found.split(";")}
    assert codes == ({"0", "1", "2", "32", "36", "90"} if coloured else set())
    assert shown.count(f"{ESCAPE}[0m") * 2 == shown.count(ESCAPE)
    words = re.sub(rf"{ESCAPE}\[[\d;]*m", "", shown)
    assert [line.rstrip("━╸╺ ") for line in words.splitlines()] == [line.rstrip("━╸ ") for line in plain.splitlines()]


@pytest.fixture(scope="module")
def documents() -> dict[str, Callable[[], Iterator[Any]]]:
    """What some commands show; the work is done once."""
    run, methods = estimate(MODEL), compare(MODEL)
    cards = [fit(MODEL, run.config, gpu=gpu) for gpu in ("1000MiB", "8GiB")]
    return {
        "estimate": lambda: estimate_lines(run),
        "explain": lambda: explanation(run),
        "compare": lambda: comparison_lines(methods),
        "cards": lambda: card_lines(cards),
        **{f"fit {report.gpu.name}": partial(fit_lines, report) for report in cards},
    }


@pytest.mark.parametrize("columns", [20, 40, 60, 100, 300])
def test_no_number_is_cut_or_broken_however_wide_the_terminal_is(
    documents: dict[str, Callable[[], Iterator[Any]]], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    for name, lines in documents.items():
        monkeypatch.setenv("COLUMNS", "80")
        whole = rendered(lines())
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = rendered(lines())
        assert re.findall(r"[\d.,]*\d", shown) == re.findall(r"[\d.,]*\d", whole), name
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= min(max(columns, 80), 120), name


def test_bars_of_fit_are_as_long_as_the_card(documents: dict[str, Callable[[], Iterator[Any]]]) -> None:
    """The longer of what is needed and what is there fills the lines; over many cards each has all of its bar."""
    lengths = {name: [len(bar) for bar in re.findall("[━╸]+", rendered(lines()))] for name, lines in documents.items()}
    needed, card = lengths["fit 8GiB"]
    assert needed < card / 4
    needed, card = lengths["fit 1000MiB"]
    assert needed * 0.5 < card < needed
    assert lengths["cards"][0] > 4 * lengths["cards"][1]
