"""The notebooks run from top to bottom, as a reader would run them: without network, GPU or the repository around.

After a change of numbers or words, `MEMPLAN_UPDATE_NOTEBOOKS=1 pytest tests/test_notebooks.py` writes their outputs
anew.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # what the notebook libraries say about each other
    import nbformat
    from nbclient import NotebookClient

from tests.printed import agree

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> nbformat.NotebookNode:
    notebook: nbformat.NotebookNode = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    return notebook


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """The lines of text that its cells print."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [line for output in outputs for line in output.get("text", "").splitlines()]


def write(path: Path, notebook: nbformat.NotebookNode) -> None:
    """Without what differs from machine to machine."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)


def test_there_are_four_notebooks() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["1-", "2-", "3-", "4-"]


@pytest.mark.filterwarnings("ignore")  # those of jupyter itself; what a cell warns of is in its output
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_an_error(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = read(path)
    committed = printed(notebook)
    resources = {"metadata": {"path": tmp_path}}
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", coalesce_streams=True, resources=resources)
    client.execute()  # raises CellExecutionError with the traceback of the cell
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error" or output.get("name") == "stderr"]
    assert [output for output in shown if "image/png" in output.get("data", {})]
    if os.environ.get("MEMPLAN_UPDATE_NOTEBOOKS") == "1":
        write(path, notebook)
        return
    today = printed(notebook)
    assert len(committed) == len(today)
    assert [(old, new) for old, new in zip(committed, today, strict=True) if not agree(old, new)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_its_outputs_and_no_place_of_a_machine(path: Path) -> None:
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(cell.outputs for cell in code)
    sources = "\n".join(cell.source for cell in code)
    assert set(re.findall(r"(?:from|import) (memplan[\w.]*)", sources)) == {"memplan"}  # what is public is there
    said = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert not re.search(r"(?:/home|/root|/tmp|/opt|/work|site-packages)/", said)
