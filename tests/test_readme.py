"""What the README shows is what happens: every command runs, and prints what stands there.

After a change of numbers or words, `MEMPLAN_UPDATE_README=1 pytest tests/test_readme.py` writes the blocks anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from memplan.cli import app
from tests.printed import agree

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELLIPSIS = "..."


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
    command: str, shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed = run(command, capsys)
    if os.environ.get("MEMPLAN_UPDATE_README") == "1" and not follows(shown, printed):
        rewrite(command, shown, printed)
        return
    assert status == (1 if "does not fit" in "".join(printed) else 0)
    assert follows(shown, printed), "\n".join(printed)


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
