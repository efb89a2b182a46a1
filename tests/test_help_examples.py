"""Every example of every help is a command that works."""

from __future__ import annotations

import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from memplan.cli import app

EPILOGS = {"": app.EPILOG, **{name: import_module(f"memplan.cli.{name}").EPILOG for name in app.COMMANDS}}
EXAMPLES = [line.strip() for text in EPILOGS.values() for line in text.splitlines() if line.startswith("  memplan ")]
CONFIG = (
    '{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, '
    '"num_attention_heads": 4, "vocab_size": 256}'
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of their own that examples speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text(CONFIG)
    data = Path(__file__).parent / "data"
    measured = sorted((data / "measured").glob("*.jsonl"))[0]
    (tmp_path / "my-gpu.jsonl").write_text((data / "traced" / "h200.jsonl").read_text())
    shutil.copytree(data / "traced" / "h200.jsonl.traces", tmp_path / "my-gpu.jsonl.traces")
    monkeypatch.setattr("memplan.validation.shipped_files", lambda: [measured])  # test_accuracy replays those shipped
    (tmp_path / "train.jsonl").write_text('{"text": "a line to train on"}\n' * 8)
    return tmp_path


@pytest.mark.parametrize("name", app.COMMANDS)
def test_every_help_has_two_examples(name: str) -> None:
    assert EPILOGS[name].count("\n  memplan ") >= 2


@pytest.mark.parametrize("example", [e for e in EXAMPLES if not e.startswith("memplan calibrate")])
def test_an_example_works(example: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(example.partition(" && ")[0])
    status = app.run(words[1:])
    out, err = capsys.readouterr()
    assert status in ((0, 1) if words[1] == "fit" else (0,)), err
    named = [words[words.index(flag) + 1] for flag in ("-o", "--plot") if flag in words]
    assert out or named
    assert all((files / path).stat().st_size > 1000 for path in named)
