"""What the README shows is what happens: every command runs, and prints what stands there.

After a change of numbers or words, `MEMPLAN_UPDATE_README=1 pytest tests/test_readme.py` writes the blocks anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memplan import Validation
from memplan.cli import app
from memplan.validation import validate
from tests.printed import agree
from tests.shipped_records import shipped

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELLIPSIS = "..."
TODAY = {
    "H200, drawn at random": {"h200-drawn", "h200-drawn-2"},
    "H200, real and published models": {"h200-real", "h200-published"},
    "H100, drawn at random": {"h100-drawn"},
    "H100, published models": {"h100-published"},
    "those the formulas were written with": {"h200-before-freeze"},
}
"""Rows of the README's table of errors, and their record files."""


def sessions() -> list[tuple[str, list[str]]]:
    """Every `$ memplan …` of the README with the lines below it."""
    found: list[tuple[str, list[str]]] = []
    for block in BLOCK.findall(README.read_text(encoding="utf-8")):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
    return [(command, shown) for command, shown in found if command.startswith("memplan ")]


pytestmark = pytest.mark.xdist_group("shipped records")  # one process replays them


@pytest.fixture(autouse=True)
def replays_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`memplan validate` of the shipped records, which tests/test_accuracy.py replays as well."""

    def validate_once(paths: Sequence[Path], **kwargs: Any) -> Validation:
        return validate(paths, **kwargs) if paths else shipped()

    monkeypatch.setattr("memplan.validation.validate", validate_once)


def run(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = app.run(shlex.split(command)[1:])
    return status, capsys.readouterr().out.splitlines()


def follows(shown: list[str], printed: list[str]) -> bool:
    """Whether `printed` is what is shown; a line of three dots stands for any number of lines."""
    if not shown:
        return not printed
    if shown[0] == ELLIPSIS:
        return any(follows(shown[1:], printed[start:]) for start in range(len(printed) + 1))
    return bool(printed) and agree(shown[0], printed[0]) and follows(shown[1:], printed[1:])


@pytest.mark.parametrize(("command", "shown"), sessions(), ids=[command for command, _ in sessions()])
def test_commands_print_what_the_readme_shows(
    command: str, shown: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed = run(command, capsys)
    if os.environ.get("MEMPLAN_UPDATE_README") == "1" and not follows(shown, printed):
        rewrite(command, shown, printed)
        return
    assert status == (1 if command.startswith("memplan fit") and "does not fit" in "".join(printed) else 0)
    assert follows(shown, printed), "\n".join(printed)


COMMAND = re.compile(r"`(memplan [a-z]+[^`]*)`")


@pytest.mark.parametrize("command", sorted(set(COMMAND.findall(README.read_text(encoding="utf-8")))))
def test_options_named_in_the_text_are_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands that need a GPU stand in the text, where they are not run."""
    _, name, *words = shlex.split(command)
    assert app.run([name, "--help"]) == 0
    described = capsys.readouterr().out
    assert all(word in described for word in words if word.startswith("--"))


def rewrite(command: str, shown: list[str], printed: list[str]) -> None:
    """Puts `printed` below `command`; a block with three dots is for a person to cut."""
    assert ELLIPSIS not in shown, "\n".join(printed)
    text = README.read_text(encoding="utf-8")
    old = "\n".join([f"$ {command}", *shown]) + "\n"
    assert text.count(old) == 1
    README.write_text(text.replace(old, "\n".join([f"$ {command}", *printed]) + "\n"), encoding="utf-8")


def test_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = PYTHON.findall(README.read_text(encoding="utf-8"))
    assert len([line for line in code.splitlines() if line]) <= 8
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_two_commands_set_it_up_and_continuous_integration_runs_them() -> None:
    text = README.read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (pip install .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    assert "memplan estimate llama-7b --method qlora --rank 16" in commands[0]
    assert "pytest" in commands[1]


def test_files_that_it_names_are_there() -> None:
    tree = README.read_text(encoding="utf-8").partition("## Files")[2]
    folder, named = ROOT, 0
    for line in tree.splitlines():
        match = re.match(r"( *)([\w./]+) {2,}\S", line) or re.match(r"( *)(\w+/)$", line)
        if match is None:
            continue
        folder = folder if match.group(1) else ROOT
        path = folder / match.group(2)
        assert path.exists(), path
        named += 1
        if not match.group(1) and match.group(2) == "memplan/":
            folder = path
    assert named > 10


def test_errors_of_time_are_those_of_the_fit() -> None:
    told = json.loads((ROOT / "memplan/data/timing_h200.json").read_text(encoding="utf-8"))
    held_out, fitted = told["held_out"], told["fitted"]["all"]
    text = " ".join(README.read_text(encoding="utf-8").split())
    found = re.search(
        r"fitted on (\d+) and scored on the (\d+) others: error (.*?) %.*?, (.*?) % .*?, bias (.*?) %", text
    )
    assert found is not None
    rows = [int(found[1]), int(found[2])]
    shares = [float(figure.replace("−", "-")) / 100 for figure in found.groups()[2:]]
    assert rows == [fitted["rows"], held_out["all"]["rows"]]
    assert shares == pytest.approx([held_out["all"][name] for name in ("median", "p90", "bias")], abs=6e-4)
    by_bound = re.search(r"is waited for, the median is (.*?) %; where .*?, (.*?) %", text)
    assert by_bound is not None
    medians = [held_out[kind]["median"] for kind in ("device-bound", "launch-bound")]
    assert [float(figure) / 100 for figure in by_bound.groups()] == pytest.approx(medians, abs=6e-4)
    assert f"and {len(told['constants'])} constants" in text
    after = re.search(r"as `memplan calibrate` learns them: (.*?) % .*?, (.*?) % .*?, bias (.*?) %", text)
    assert after is not None
    calibrated = [float(figure.replace("−", "-")) / 100 for figure in after.groups()]
    assert calibrated == pytest.approx(
        [told["calibrated"]["all"][name] for name in ("median", "p90", "bias")], abs=6e-4
    )


@pytest.fixture(scope="module")
def validation() -> Validation:
    return shipped()


def test_the_table_of_errors_is_what_a_replay_gives(validation: Validation) -> None:
    """The rows of today; those before the runs were measured are history. An int8 base stands apart."""
    section = README.read_text(encoding="utf-8").partition("## How far off it is")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| ([^|]*) \| today \| (.*) \|$", section, re.MULTILINE))
    found = {"int8 base": [run for run in validation.runs if run.base == "int8"]}
    for name, files in TODAY.items():
        found[name] = [run for run in validation.runs if run.file in files and run.base != "int8"]
    assert shown.keys() == found.keys()
    for name, runs in found.items():
        count, *cells = shown[name].split(" | ")
        assert int(count) == len(runs)
        for tier, cell in zip(("allocated", "reserved", "process"), cells, strict=True):
            errors = [100 * row.error for row in validation.rows(tier, runs)]
            mean, worst = (float(text.replace("\u2212", "-")) for text in re.findall(r"([-+\u2212]?[\d.]+) %", cell))
            assert mean == pytest.approx(sum(map(abs, errors)) / len(errors), rel=0.01, abs=0.001), (name, tier)
            assert worst == pytest.approx(max(errors, key=abs), abs=0.05), (name, tier)
    others = [run for run in validation.runs if run.base != "int8"]
    reserved = validation.rows("reserved", others)
    said = re.search(
        rf"the other\s{len(others)} runs, (\d+) are right in allocated to the byte, and (\d+) of {len(reserved)} in",
        section,
    )
    assert said is not None
    assert int(said[1]) == pytest.approx(sum(row.error == 0 for row in validation.rows("allocated", others)), abs=5)
    assert int(said[2]) == pytest.approx(sum(row.error == 0 for row in reserved), abs=5)
    by_gpu = Counter(run.file.partition("-")[0] for run in validation.runs)
    assert f"{len(validation.runs)} training steps" in section
    assert f"{by_gpu['h200']} on an H200 and {by_gpu['h100']} on an H100" in section
    assert f"{len({run.family for run in validation.runs})} families" in section


def test_measured_figures_beside_other_tools_are_those_of_the_records(validation: Validation) -> None:
    section = README.read_text(encoding="utf-8").partition("## Other tools")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w.-]+) (\w+), [^|]* \| ([\d.]+) \| ([\d.]+) \| ", section, re.MULTILINE)
    runs = {(run.record.case.id, run.method): run for run in validation.runs if run.file == "h200-real"}
    for model, method, measured, predicted in rows:
        (run,) = (r for (id_, m), r in runs.items()
                  if id_.startswith(f"real-{model.replace('.', '_')}-") and m == method.lower())  # fmt: skip
        row = run.row("process")
        assert row is not None
        assert row.measured_bytes / 2**30 == pytest.approx(float(measured), abs=0.006)
        assert row.predicted_bytes / 2**30 == pytest.approx(float(predicted), abs=0.006)
    assert len(rows) == 4


def test_figures_of_the_tiers_are_those_of_compare() -> None:
    """The table of 120, 16 and 5 GB."""
    from memplan.compare import compare

    section = README.read_text(encoding="utf-8").partition("## 120")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (allocated|reserved|process) \| [^|]* \| (.*) \|$", section, re.MULTILINE))
    columns = compare("llama-7b").columns
    for tier, row in rows.items():
        for cell, column in zip(row.split(" | "), columns, strict=True):
            size = getattr(column.estimate, f"{tier}_bytes")
            for figure, unit in re.findall(r"([\d.]+) (GiB|GB)", cell):
                assert size / {"GiB": 2**30, "GB": 1e9}[unit] == pytest.approx(float(figure), rel=0.01)
    assert len(rows) == 3
